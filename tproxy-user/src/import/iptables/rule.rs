//! The words of one rule of iptables-save → [`Rule`].

use std::net::{IpAddr, SocketAddr};

use crate::cli::parse;
use crate::config::Mark;
use crate::nft::Chain;

use super::super::model::{Rule, SetMark, Verdict};
use super::matching::Matching;

/// Targets that do nothing to where a packet goes. They stay in force beside tproxy.
const HARMLESS: [&str; 24] = [
    "AUDIT",
    "CHECKSUM",
    "CLASSIFY",
    "CONNMARK",
    "CONNSECMARK",
    "CT",
    "DSCP",
    "ECN",
    "HL",
    "IDLETIMER",
    "LED",
    "LOG",
    "MASQUERADE",
    "NFLOG",
    "NOTRACK",
    "RATEEST",
    "SECMARK",
    "SET",
    "SNAT",
    "TCPMSS",
    "TCPOPTSTRIP",
    "TOS",
    "TRACE",
    "TTL",
];

/// Reads what comes after `-A CHAIN`. `chain` knows the chains of the table.
///
/// # Errors
/// What is malformed.
pub(super) fn parse(
    words: &[String],
    source: usize,
    v6: bool,
    chain: &dyn Fn(&str) -> Option<Chain>,
) -> Result<Rule, String> {
    let mut words = Words(words);
    let mut matching = Matching::new(v6);
    let mut target = Target::default();
    let mut negated = false;
    while let Some(word) = words.next() {
        match word {
            "!" => {
                negated = true;
                continue;
            }
            "-j" | "--jump" => {
                let name = words.argument(word)?;
                target =
                    chain(name).map_or_else(|| Target::named(name), |chain| Target::of(Verdict::Jump(chain)));
            }
            "-g" | "--goto" => {
                let name = words.argument(word)?;
                let chain = chain(name).ok_or_else(|| format!("there is no chain {name} to go to"))?;
                target = Target::of(Verdict::Goto(chain));
            }
            _ if target.verdict.is_some() => target.option(word, &mut words)?,
            _ => matching.option(word, negated, &mut words)?,
        }
        negated = false;
    }
    Ok(Rule {
        source,
        matches: matching.matches,
        mark: target.mark,
        verdict: target.verdict.unwrap_or(Verdict::Continue),
    })
}

/// The words that are not read yet.
pub(super) struct Words<'a>(&'a [String]);

impl<'a> Words<'a> {
    fn next(&mut self) -> Option<&'a str> {
        let (word, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(word)
    }

    /// The argument of an option.
    pub(super) fn argument(&mut self, option: &str) -> Result<&'a str, String> {
        self.next().ok_or_else(|| format!("{option} has no argument"))
    }

    /// Goes on to the next option.
    pub(super) fn skip_arguments(&mut self) {
        while self.0.first().is_some_and(|word| !word.starts_with('-') && word != "!") {
            self.next();
        }
    }
}

/// What a rule does.
#[derive(Debug, Default)]
struct Target {
    name: String,
    verdict: Option<Verdict>,
    mark: Option<SetMark>,
}

impl Target {
    fn of(verdict: Verdict) -> Self {
        Self { verdict: Some(verdict), ..Self::default() }
    }

    fn named(name: &str) -> Self {
        let verdict = match name {
            "ACCEPT" => Verdict::Accept,
            "DROP" => Verdict::Drop,
            "REJECT" => Verdict::Reject,
            "RETURN" => Verdict::Return,
            "TPROXY" => Verdict::Proxy(None),
            "REDIRECT" => Verdict::Redirect(None),
            "DNAT" => Verdict::Other { why: "DNAT without an address".to_owned(), captures: true },
            "MARK" => Verdict::Continue,
            _ if HARMLESS.contains(&name) => Verdict::Continue,
            _ => Verdict::Other { why: format!("nothing here is like target {name}"), captures: false },
        };
        Self { name: name.to_owned(), verdict: Some(verdict), mark: None }
    }

    fn option(&mut self, option: &str, words: &mut Words<'_>) -> Result<(), String> {
        match (&*self.name, option) {
            ("TPROXY", "--on-port") => {
                let port = words.argument(option)?;
                let port = port.parse::<u16>().map_err(|_| format!("{option} {port}: expected a port"))?;
                // 0, the default: the port that the packet has.
                self.verdict = Some(Verdict::Proxy(Some(port).filter(|port| *port != 0)));
            }
            ("TPROXY", "--tproxy-mark") | ("MARK", "--set-xmark") => {
                let Mark { value, mask } = parse::value_and_mask(words.argument(option)?)?;
                self.mark = Some(SetMark { keep: !mask, flip: value });
            }
            ("MARK", "--set-mark") => {
                let Mark { value, mask } = parse::value_and_mask(words.argument(option)?)?;
                self.mark = Some(SetMark { keep: !(mask | value), flip: value });
            }
            ("MARK", "--or-mark" | "--and-mark" | "--xor-mark") => {
                let bits = parse::number(words.argument(option)?)?;
                self.mark = Some(match option {
                    "--or-mark" => SetMark { keep: !bits, flip: bits },
                    "--and-mark" => SetMark { keep: bits, flip: 0 },
                    _ => SetMark { keep: u32::MAX, flip: bits },
                });
            }
            ("REDIRECT", "--to-ports") => {
                let ports = words.argument(option)?;
                self.verdict =
                    Some(ports.parse().map_or_else(|_| several(ports), |port| Verdict::Redirect(Some(port))));
            }
            ("DNAT", "--to-destination") => {
                let to = words.argument(option)?;
                let target = to.parse::<SocketAddr>().map(|to| (to.ip(), Some(to.port())));
                let target = target.or_else(|_| to.parse::<IpAddr>().map(|address| (address, None)));
                self.verdict =
                    Some(target.map_or_else(|_| several(to), |(ip, port)| Verdict::Dnat(ip, port)));
            }
            _ => words.skip_arguments(),
        }
        Ok(())
    }
}

fn several(targets: &str) -> Verdict {
    Verdict::Other { why: format!("a divert has one target, not several ({targets})"), captures: true }
}
