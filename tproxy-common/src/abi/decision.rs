//! What is decided of a flow, in numbers that maps and the image of the rules hold.

/// What was decided for a flow.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel forwards it; nothing of it reaches userspace.
    Pass = 1,
    /// It goes to the proxy.
    Proxy = 2,
    /// It goes to the proxy, and from there to a target of the rule's.
    Divert = 3,
    /// It is refused: TCP by a reset, UDP by the proxy's ICMP error.
    Reject = 4,
    /// It is thrown away.
    Drop = 5,
    /// It goes to the proxy, which decides by the name that the flow is for; where it
    /// finds none, by what [`Flow::fallback`](super::Flow::fallback) says.
    Ask = 6,
}

impl Verdict {
    /// Reads the number that a map holds.
    #[inline(always)]
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            1 => Some(Self::Pass),
            2 => Some(Self::Proxy),
            3 => Some(Self::Divert),
            4 => Some(Self::Reject),
            5 => Some(Self::Drop),
            6 => Some(Self::Ask),
            _ => None,
        }
    }

    /// Whether packets of a flow are handed to the proxy. `raw` as a map holds it.
    #[inline(always)]
    #[must_use]
    pub const fn is_for_proxy(raw: u8, protocol: u8) -> bool {
        raw == Self::Proxy as u8
            || raw == Self::Divert as u8
            || raw == Self::Ask as u8
            || (raw == Self::Reject as u8 && protocol == super::UDP)
    }
}

/// What the rules say of a flow, in the word that an image of them holds: the
/// [`Verdict`], the number of the rule, and that of its target; of a flow whose name has to be
/// found also the verdict where none is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision(u32);

#[allow(clippy::cast_possible_truncation, reason = "a word is taken apart")]
impl Decision {
    /// Numbers of rules and of targets are below this.
    pub const NUMBERS: u16 = 1 << 12;

    const VERDICT: u32 = 0x0f;
    const FALLBACK: u32 = 4;
    const BEHIND_NAMES: u32 = 0x80;

    /// A decision that is no rule's.
    #[inline(always)]
    #[must_use]
    pub const fn by_default(verdict: Verdict) -> Self {
        Self(verdict as u32)
    }

    /// A decision with its parts as a map holds them: the verdict, the rule, counted from 1 on,
    /// and the target, which is of [`Divert`](Verdict::Divert) alone. Both are below
    /// [`NUMBERS`](Self::NUMBERS).
    #[inline(always)]
    #[must_use]
    pub const fn of(verdict: u8, rule: u16, target: u16) -> Self {
        Self(verdict as u32 | (rule as u32) << 8 | (target as u32) << 20)
    }

    /// Reads a word.
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u32) -> Self {
        Self(word)
    }

    /// The word.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u32 {
        self.0
    }

    /// The verdict, as a map holds it.
    #[inline(always)]
    #[must_use]
    pub const fn raw_verdict(self) -> u8 {
        (self.0 & Self::VERDICT) as u8
    }

    /// This, of a rule (or of none) that stands behind rules which ask for names: for a flow
    /// whose name is not known it holds only where none of those matches.
    #[inline(always)]
    #[must_use]
    pub const fn behind_names(self) -> Self {
        Self(self.0 | Self::BEHIND_NAMES)
    }

    /// Whether it is such.
    #[inline(always)]
    #[must_use]
    pub const fn is_behind_names(self) -> bool {
        self.0 & Self::BEHIND_NAMES != 0
    }

    /// This, for good: it does not matter any more where its rule stands.
    #[inline(always)]
    #[must_use]
    pub const fn settled(self) -> Self {
        Self(self.0 & !Self::BEHIND_NAMES)
    }

    /// The proxy is to [ask](Verdict::Ask) for the name; this is decided where there is none.
    #[inline(always)]
    #[must_use]
    pub const fn asked(self) -> Self {
        let verdict = self.0 & Self::VERDICT;
        let rest = self.settled().0 & !Self::VERDICT;
        Self(rest | verdict << Self::FALLBACK | Verdict::Ask as u32)
    }

    /// What was decided where there is no name, of a flow that is [asked](Self::asked) about.
    #[inline(always)]
    #[must_use]
    pub const fn fallback(self) -> u8 {
        (self.0 >> Self::FALLBACK) as u8 & 0x07
    }

    /// What an entry of the flow table says.
    #[inline(always)]
    #[must_use]
    pub const fn of_flow(verdict: u8, fallback: u8, rule: u16, target: u16) -> Self {
        Self(Self::of(verdict, rule, target).0 | (fallback as u32) << Self::FALLBACK)
    }

    /// Number of the rule; 0 where none decided.
    #[inline(always)]
    #[must_use]
    pub const fn rule(self) -> u16 {
        (self.0 >> 8) as u16 % Self::NUMBERS
    }

    /// Number of the target.
    #[inline(always)]
    #[must_use]
    pub const fn target(self) -> u16 {
        (self.0 >> 20) as u16
    }
}
