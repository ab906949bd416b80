//! SOCKS5 (RFC 1928), with user and password (RFC 1929): the client's side of a handshake.
//!
//! [`Handshake`] does no input or output of its own: it says what to send and how many bytes to
//! read, never one more than the server sends before the flow's own.

pub mod datagram;
mod reply;

use std::net::SocketAddr;

pub use reply::{Reply, Violation};

use super::destination::Destination;
use crate::config::upstream::Credentials;

const VERSION: u8 = 5;
/// Of the messages that carry user and password.
const PASSWORD_VERSION: u8 = 1;

/// Ways to say who one is.
mod method {
    pub(super) const NONE: u8 = 0;
    pub(super) const PASSWORD: u8 = 2;
    pub(super) const NOT_ACCEPTABLE: u8 = 0xff;
}

/// How addresses are told.
mod address {
    pub(super) const V4: u8 = 1;
    pub(super) const NAME: u8 = 3;
    pub(super) const V6: u8 = 4;
}

/// The longest message of a server: version, reply, reserved byte, a name of 255 bytes with its
/// kind and length, port.
pub const LONGEST: usize = 3 + 2 + 255 + 2;

/// What a server is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// A connection.
    Connect(Destination<'a>),
    /// To carry datagrams that come from this address; with port 0 they may come from any.
    UdpAssociate(SocketAddr),
    /// Nothing: it is over where a request would go.
    Nothing,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// [`Handshake::wants`] more bytes of the server.
    Read,
    /// These bytes are to be sent, then read.
    Send(Vec<u8>),
    /// It is over: the server does what it was asked for, at this address of its own. `None`:
    /// at one that it names, which nobody should have to look up.
    Done(Option<SocketAddr>),
}

/// A handshake that is under way.
#[derive(Debug)]
pub struct Handshake<'a> {
    command: Command<'a>,
    credentials: Option<&'a Credentials>,
    expects: Expects,
    /// All is said already.
    said: bool,
}

#[derive(Clone, Copy, Debug)]
enum Expects {
    /// Which method the server takes.
    Method,
    /// What it thinks of user and password.
    Verdict,
    /// The reply up to the first byte of the address, which says how long that is.
    Reply,
    /// The rest of it: so many bytes, of an address of this kind.
    Bound { kind: u8, first: u8, rest: usize },
}

impl<'a> Handshake<'a> {
    /// Begins one; these bytes are sent first. A `pipelined` one says all at once, in one round
    /// trip instead of two or three: not every server reads on where it has read.
    #[must_use]
    pub fn new(
        command: Command<'a>,
        credentials: Option<&'a Credentials>,
        pipelined: bool,
    ) -> (Self, Vec<u8>) {
        // Who has a password is not taken for who has none: the one method that fits.
        let method = if credentials.is_some() { method::PASSWORD } else { method::NONE };
        let mut first = vec![VERSION, 1, method];
        if pipelined {
            first.extend(credentials.map(password).unwrap_or_default());
            first.extend(request(command).unwrap_or_default());
        }
        (Self { command, credentials, expects: Expects::Method, said: pipelined }, first)
    }

    /// What is to be sent, where it was not yet.
    fn say(&self, bytes: Vec<u8>) -> Step {
        if self.said { Step::Read } else { Step::Send(bytes) }
    }

    /// How many bytes of the server it needs now, at most [`LONGEST`].
    #[must_use]
    pub fn wants(&self) -> usize {
        match self.expects {
            Expects::Method | Expects::Verdict => 2,
            Expects::Reply => 5,
            Expects::Bound { rest, .. } => rest,
        }
    }

    /// Takes exactly as many bytes as it [wants](Self::wants).
    ///
    /// # Errors
    /// [`Violation`]: the server refuses, or speaks something else.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Step, Violation> {
        match (self.expects, bytes) {
            (Expects::Method, [VERSION, chosen]) => self.method(*chosen),
            (Expects::Method, [b'H', b'T']) => Err(Violation::Http),
            (Expects::Verdict, [PASSWORD_VERSION, 0]) => Ok(self.request()),
            (Expects::Verdict, [PASSWORD_VERSION, _]) => Err(Violation::Credentials),
            (Expects::Reply, [VERSION, 0, _, kind, first]) => {
                let rest = match *kind {
                    address::V4 => 3 + 2,
                    address::V6 => 15 + 2,
                    address::NAME => usize::from(*first) + 2,
                    other => return Err(Violation::AddressKind(other)),
                };
                self.expects = Expects::Bound { kind: *kind, first: *first, rest };
                Ok(Step::Read)
            }
            (Expects::Reply, [VERSION, reply, ..]) => Err(Violation::Refused(Reply(*reply))),
            (Expects::Bound { kind, first, .. }, rest) => bound(kind, first, rest).ok_or(Violation::Length),
            (_, [version, ..]) => Err(Violation::Version(*version)),
            (_, []) => Err(Violation::Length),
        }
    }

    fn method(&mut self, chosen: u8) -> Result<Step, Violation> {
        match (chosen, self.credentials) {
            (method::NONE, None) => Ok(self.request()),
            (method::PASSWORD, Some(credentials)) => {
                self.expects = Expects::Verdict;
                Ok(self.say(password(credentials)))
            }
            (method::NOT_ACCEPTABLE, None) => Err(Violation::WantsCredentials),
            (method::NOT_ACCEPTABLE, Some(_)) => Err(Violation::WantsNone),
            (other, _) => Err(Violation::Method(other)),
        }
    }

    fn request(&mut self) -> Step {
        self.expects = Expects::Reply;
        request(self.command).map_or(Step::Done(None), |request| self.say(request))
    }
}

/// The request; `None`: nothing is asked for.
fn request(command: Command<'_>) -> Option<Vec<u8>> {
    let (command, destination) = match command {
        Command::Connect(to) => (1, to),
        Command::UdpAssociate(from) => (3, Destination::Address(from)),
        Command::Nothing => return None,
    };
    let mut request = vec![VERSION, command, 0];
    write_destination(&mut request, destination);
    Some(request)
}

fn password(credentials: &Credentials) -> Vec<u8> {
    let mut message = vec![PASSWORD_VERSION];
    for text in [&*credentials.username, credentials.password.reveal()] {
        // `Credentials` are no longer than the protocol has them.
        message.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        message.extend(text.bytes().take(usize::from(u8::MAX)));
    }
    message
}

fn write_destination(to: &mut Vec<u8>, destination: Destination<'_>) {
    match destination {
        Destination::Address(address) => write_address(to, address),
        Destination::Name(name, port) => {
            to.extend([address::NAME, u8::try_from(name.len()).unwrap_or(u8::MAX)]);
            to.extend(name.bytes().take(usize::from(u8::MAX)));
            to.extend(port.to_be_bytes());
        }
    }
}

fn write_address(to: &mut Vec<u8>, address: SocketAddr) {
    match address {
        SocketAddr::V4(address) => {
            to.push(address::V4);
            to.extend(address.ip().octets());
        }
        SocketAddr::V6(address) => {
            to.push(address::V6);
            to.extend(address.ip().octets());
        }
    }
    to.extend(address.port().to_be_bytes());
}

/// The address of a reply, of which the first byte came with what stands before it.
fn bound(kind: u8, first: u8, rest: &[u8]) -> Option<Step> {
    let mut bytes = vec![first];
    bytes.extend(rest);
    let (address, port) = bytes.split_last_chunk::<2>()?;
    let port = u16::from_be_bytes(*port);
    match kind {
        address::V4 => <[u8; 4]>::try_from(address).ok().map(|ip| SocketAddr::from((ip, port))).map(Some),
        address::V6 => <[u8; 16]>::try_from(address).ok().map(|ip| SocketAddr::from((ip, port))).map(Some),
        _ => Some(None),
    }
    .map(Step::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), 443);

    /// What came of a handshake, `None` if the server has said too little; what was sent; and what
    /// the server had said more.
    type Outcome<'a> = (Option<Result<Option<SocketAddr>, Violation>>, Vec<Vec<u8>>, &'a [u8]);

    /// Feeds all that a server says, in the pieces that are asked for.
    fn converse<'a>(
        command: Command<'_>,
        credentials: Option<&Credentials>,
        mut server: &'a [u8],
    ) -> Outcome<'a> {
        let (mut handshake, first) = Handshake::new(command, credentials, false);
        let mut sent = vec![first];
        loop {
            let wants = handshake.wants();
            assert!((1..=LONGEST).contains(&wants));
            let Some((piece, rest)) = server.split_at_checked(wants) else { return (None, sent, server) };
            server = rest;
            match handshake.receive(piece) {
                Ok(Step::Read) => {}
                Ok(Step::Send(bytes)) => sent.push(bytes),
                Ok(Step::Done(bound)) => return (Some(Ok(bound)), sent, server),
                Err(violation) => return (Some(Err(violation)), sent, server),
            }
        }
    }

    #[test]
    fn a_server_without_password_is_asked_at_once() {
        let server = b"\x05\x00\x05\x00\x00\x01\x0a\x00\x00\x02\x1f\x90SSH-2.0";
        let (outcome, sent, left) = converse(Command::Connect(Destination::Address(TO)), None, server);
        assert_eq!(outcome, Some(Ok(Some(([10, 0, 0, 2], 8080).into()))));
        assert_eq!(sent, [&b"\x05\x01\x00"[..], b"\x05\x01\x00\x01\xc0\x00\x02\x01\x01\xbb"]);
        assert_eq!(left, b"SSH-2.0", "what the destination says first is not touched");
    }

    #[test]
    fn a_password_goes_before_the_request() {
        let credentials = Credentials::new("alice", "s3cret").expect("fits");
        let to = Command::Connect(Destination::Address("[2001:db8::1]:53".parse().expect("an address")));
        let server = [&b"\x05\x02\x01\x00\x05\x00\x00\x03\x04exit\x00\x01"[..]].concat();
        let (outcome, sent, left) = converse(to, Some(&credentials), &server);
        assert_eq!((outcome, left), (Some(Ok(None)), &b""[..]));
        assert_eq!(sent[0], b"\x05\x01\x02");
        assert_eq!(sent[1], b"\x01\x05alice\x06s3cret");
        assert_eq!(sent[2], b"\x05\x01\x00\x04\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\x00\x35");
    }

    #[test]
    fn all_can_be_said_at_once() {
        let credentials = Credentials::new("u", "p").expect("fits");
        let to = Command::Connect(Destination::Address(TO));
        let (mut handshake, first) = Handshake::new(to, Some(&credentials), true);
        assert_eq!(first, b"\x05\x01\x02\x01\x01u\x01p\x05\x01\x00\x01\xc0\x00\x02\x01\x01\xbb");
        for piece in [&b"\x05\x02"[..], b"\x01\x00", b"\x05\x00\x00\x01\x0a"] {
            assert_eq!(handshake.receive(piece), Ok(Step::Read));
        }
        let bound = Some(([10, 0, 0, 2], 80).into());
        assert_eq!(handshake.receive(b"\x00\x00\x02\x00\x50"), Ok(Step::Done(bound)));
    }

    #[test]
    fn a_name_is_asked_for_as_it_is() {
        let to = Destination::of(TO, Some("www.example.org"));
        let (_, sent, _) = converse(Command::Connect(to), None, b"\x05\x00");
        assert_eq!(sent[1], b"\x05\x01\x00\x03\x0fwww.example.org\x01\xbb");
        let long = "x".repeat(256);
        assert_eq!(Destination::of(TO, Some(&long)), Destination::Address(TO));
    }

    #[test]
    fn datagrams_are_asked_for_without_an_address() {
        let (_, sent, _) = converse(Command::UdpAssociate(([0; 4], 0).into()), None, b"\x05\x00");
        assert_eq!(sent[1], b"\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00");
    }

    #[test]
    fn refusals_and_other_languages_are_told_apart() {
        let credentials = Credentials::new("alice", "s3cret").expect("fits");
        for (server, password, expected) in [
            (&b"\x05\xff"[..], false, Violation::WantsCredentials),
            (b"\x05\xff", true, Violation::WantsNone),
            (b"\x05\x02", false, Violation::Method(2)),
            (b"\x05\x00", true, Violation::Method(0)),
            (b"\x05\x02\x01\x01", true, Violation::Credentials),
            (b"\x04\x5a", false, Violation::Version(4)),
            (b"HTTP/1.1 400", false, Violation::Http),
            (b"\x05\x00\x05\x05\x00\x01\x00", false, Violation::Refused(Reply::CONNECTION_REFUSED)),
            (b"\x05\x00\x05\x00\x00\x09\x00", false, Violation::AddressKind(9)),
            (b"\x05\x00\x04\x00\x00\x01\x00", false, Violation::Version(4)),
        ] {
            let (outcome, ..) = converse(
                Command::Connect(Destination::Address(TO)),
                password.then_some(&credentials),
                server,
            );
            assert_eq!(outcome, Some(Err(expected)));
        }
    }
}
