//! The host of an HTTP/1 request (RFC 9112, section 3.2).

use std::net::IpAddr;

use httparse::{EMPTY_HEADER, Request, Status};

use super::Sniffed;

/// Fields that a request may have; servers take about as many.
const FIELDS: usize = 128;

/// Looks at a request from its first byte on.
pub(super) fn request(bytes: &[u8]) -> Sniffed {
    let mut fields = [EMPTY_HEADER; FIELDS];
    let mut request = Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(Status::Partial) => Sniffed::More,
        Ok(Status::Complete(_)) => Sniffed::of(host(&request)),
        Err(_) => Sniffed::Nothing,
    }
}

/// The host in the request's target goes before the field, which a request must have once.
fn host<'a>(request: &Request<'_, 'a>) -> Option<&'a str> {
    let of_target = request.path.and_then(authority);
    let mut fields = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case("host"));
    let authority = match (of_target, fields.next(), fields.next()) {
        (Some(authority), ..) => authority,
        (None, Some(field), None) => str::from_utf8(field.value).ok()?.trim_ascii(),
        _ => return None,
    };
    let host = authority.rsplit_once(':').map_or(authority, |(host, _port)| host);
    let is_address = authority.starts_with('[') || host.parse::<IpAddr>().is_ok();
    (!is_address).then_some(host)
}

/// Of a target in absolute form, such as `http://example.org/`.
fn authority(target: &str) -> Option<&str> {
    let (scheme, rest) = target.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let without_user = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    (scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https")).then_some(without_user)
}
