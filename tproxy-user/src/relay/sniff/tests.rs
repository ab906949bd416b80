//! Whole first bytes, and all that may be made of them.

use proptest::prelude::*;

use super::check::records;
use super::*;

/// A `ClientHello` with these extensions, as a handshake message.
fn hello(extensions: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    body.extend(u16::try_from(extensions.len()).expect("short").to_be_bytes());
    body.extend(extensions);
    let mut message = vec![1, 0];
    message.extend(u16::try_from(body.len()).expect("short").to_be_bytes());
    message.extend(body);
    message
}

fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).expect("short");
    [&kind.to_be_bytes(), &length.to_be_bytes(), content].concat()
}

fn server_name(name: &str) -> Vec<u8> {
    let length = u16::try_from(name.len()).expect("short");
    let entry = [&[0][..], &length.to_be_bytes(), name.as_bytes()].concat();
    let list = u16::try_from(entry.len()).expect("short");
    extension(0, &[&list.to_be_bytes()[..], &entry].concat())
}

fn with_name(name: &str) -> Vec<u8> {
    // Encrypted Client Hello, or what looks so, hides nothing that is visible.
    let extensions = [extension(0xfe0d, &[9; 100]), server_name(name), extension(43, &[2, 3, 4])].concat();
    hello(&extensions)
}

fn name(name: &str) -> Sniffed {
    Sniffed::Name(name.to_owned())
}

#[test]
fn names_of_tls() {
    let message = with_name("www.example.org");
    for most in [16_384, 100, 7, 1] {
        assert_eq!(stream(&records(&message, most)), name("www.example.org"), "{most}");
    }
    // Without the extension, and one that is broken.
    assert_eq!(stream(&records(&hello(&[]), 500)), Sniffed::Nothing);
    assert_eq!(stream(&records(&hello(&[0, 0, 0, 9, 1]), 500)), Sniffed::Nothing);
    // Another message, an alert, an empty record.
    let mut other = message.clone();
    other[0] = 2;
    assert_eq!(stream(&records(&other, 500)), Sniffed::Nothing);
    assert_eq!(stream(&[21, 3, 1, 0, 2, 2, 40]), Sniffed::Nothing);
    assert_eq!(stream(&[22, 3, 1, 0, 0]), Sniffed::Nothing);
    assert_eq!(stream(&[22, 2]), Sniffed::Nothing);
}

#[test]
fn a_message_that_is_too_long_has_no_name() {
    let long = [extension(21, &vec![0; MOST]), server_name("late.example")].concat();
    let bytes = records(&hello(&long), 16_384);
    assert_eq!(stream(&bytes[..MOST - 1]), Sniffed::More);
    assert_eq!(stream(&bytes[..MOST]), Sniffed::Nothing);
}

#[test]
fn names_of_http() {
    for (request, expected) in [
        ("GET / HTTP/1.1\r\nHost: Example.org\r\n\r\n", name("example.org")),
        ("GET / HTTP/1.1\r\nAccept: */*\r\nhOST:  example.org:8080 \r\n\r\nbody", name("example.org")),
        ("GET http://u@a.example:1/x HTTP/1.1\r\nHost: b.example\r\n\r\n", name("a.example")),
        ("GET / HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost: not a name\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.0\r\n\r\n", Sniffed::Nothing),
        ("GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n", Sniffed::Nothing),
        ("SSH-2.0-OpenSSH_9.6\r\n", Sniffed::Nothing),
        ("\0\0\0", Sniffed::Nothing),
        ("", Sniffed::More),
        ("GET / HTTP/1.1\r\nHost: exam", Sniffed::More),
    ] {
        assert_eq!(stream(request.as_bytes()), expected, "{request:?}");
    }
}

proptest! {
    #[test]
    fn a_beginning_tells_nothing_else(at in 0_usize..400, most in 1_usize..300, http: bool) {
        let whole = if http {
            b"GET / HTTP/1.1\r\nUser-Agent: x\r\nHost: www.example.org\r\n\r\n".to_vec()
        } else {
            records(&with_name("www.example.org"), most)
        };
        let part = &whole[..at.min(whole.len())];
        let told = stream(part);
        prop_assert!(told == Sniffed::More || told == name("www.example.org"), "{:?} of {:?}", told, part);
        prop_assert_eq!(stream(&whole), name("www.example.org"));
    }

    #[test]
    fn what_holds_for_all_holds(
        mut bytes: Vec<u8>, at in 0_usize..300, value: u8, text in "(GET|[A-Z ]{0,9})[ -~\r\n]{0,80}",
    ) {
        check::first_bytes(&bytes);
        bytes.splice(0..0, [22, 3, 1]);
        check::first_bytes(&bytes);
        check::first_bytes(text.as_bytes());
        let mut altered = with_name("www.example.org");
        let at = at % altered.len();
        altered[at] = value;
        check::hello(&altered);
        check::first_bytes(&records(&altered, 200));
    }
}
