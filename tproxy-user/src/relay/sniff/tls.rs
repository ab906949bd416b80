//! The server name of a TLS `ClientHello` (RFC 8446, RFC 6066 section 3).

use tls_parser::nom::Err::Incomplete;
use tls_parser::{
    SNIType, TlsExtension, TlsMessage, TlsMessageHandshake, parse_tls_client_hello_extensions,
    parse_tls_message_handshake,
};

use super::Sniffed;

/// The content type of the first record.
pub(super) const HANDSHAKE: u8 = 22;

/// Type of a `ClientHello` among handshake messages.
const CLIENT_HELLO: u8 = 1;

/// The longest record, as it is sent (RFC 8446, section 5.1).
const LONGEST_RECORD: usize = 1 << 14;

/// Looks at records from the first on: a message may be spread over several.
pub(super) fn stream(bytes: &[u8]) -> Sniffed {
    let mut message = Vec::new();
    let mut rest = bytes;
    loop {
        match message_of(&message) {
            Sniffed::More => {}
            told => return told,
        }
        let [kind, major, _minor, high, low, after @ ..] = rest else {
            // What has come of the header must be such.
            let is_record = [HANDSHAKE, 3].iter().zip(rest).all(|(expected, byte)| expected == byte);
            return if is_record { Sniffed::More } else { Sniffed::Nothing };
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if (*kind, *major) != (HANDSHAKE, 3) || length == 0 || length > LONGEST_RECORD {
            return Sniffed::Nothing;
        }
        message.extend(&after[..length.min(after.len())]);
        rest = after.get(length..).unwrap_or_default();
    }
}

/// Looks at the handshake message that begins here.
pub(super) fn message_of(bytes: &[u8]) -> Sniffed {
    if bytes.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
        return Sniffed::Nothing;
    }
    match parse_tls_message_handshake(bytes) {
        Ok((_, TlsMessage::Handshake(TlsMessageHandshake::ClientHello(hello)))) => {
            Sniffed::of(hello.ext.and_then(server_name))
        }
        Err(Incomplete(_)) if !is_whole(bytes) => Sniffed::More,
        _ => Sniffed::Nothing,
    }
}

/// Whether a message is as long as it says; what it lacks within will not come then.
fn is_whole(bytes: &[u8]) -> bool {
    match bytes {
        [_, high, middle, low, body @ ..] => {
            body.len() >= u32::from_be_bytes([0, *high, *middle, *low]) as usize
        }
        _ => false,
    }
}

fn server_name(extensions: &[u8]) -> Option<&str> {
    let (_, extensions) = parse_tls_client_hello_extensions(extensions).ok()?;
    let names = extensions.iter().find_map(|extension| match extension {
        TlsExtension::SNI(names) => Some(names),
        _ => None,
    })?;
    let (_, name) = names.iter().find(|(kind, _)| *kind == SNIType::HostName)?;
    str::from_utf8(name).ok()
}
