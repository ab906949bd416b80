//! What it costs to find the name that a connection is for, by the bytes that are looked at.

#[path = "../../tproxy-common/benches/brief/mod.rs"]
mod brief;

use std::hint::black_box;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use simple_dns::rdata::{A, RData};
use simple_dns::{CLASS, Name, Packet, QCLASS, QTYPE, Question, ResourceRecord, TYPE};
use tproxy_user::relay::sniff::quic::Initials;
use tproxy_user::relay::sniff::{Sniffed, dns, stream};

/// Records of TLS as clients send them.
const CURL: &[u8] = include_bytes!("../fuzz/seeds/stream/tls-curl");
const OPENSSL: &[u8] = include_bytes!("../fuzz/seeds/stream/tls-openssl-1.2");

/// The first datagrams of two clients, behind their lengths: of QUIC version 1 with a whole
/// `ClientHello`, of version 2 with the beginning of one.
const QUIC_1: &[u8] = include_bytes!("../fuzz/seeds/initials/datagram-1");
const QUIC_2: &[u8] = include_bytes!("../fuzz/seeds/initials/datagram-2");

/// Type of the extension that pads a `ClientHello` (RFC 7685).
const PADDING: u16 = 21;

/// A length in two bytes.
fn length(of: usize) -> [u8; 2] {
    u16::try_from(of).expect("short").to_be_bytes()
}

/// A `ClientHello` of that many bytes in records of at most this many, its name at the end.
fn hello(bytes: usize, record: usize) -> Vec<u8> {
    const NAME: &[u8] = b"www.example.org";
    let entry = [&[0][..], &length(NAME.len()), NAME].concat();
    let name = [&[0, 0][..], &length(entry.len() + 2), &length(entry.len()), &entry].concat();
    // Before the extensions: version, random, no session, one cipher suite, no compression.
    let start = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0]].concat();
    let padding = vec![0; bytes - 4 - start.len() - 2 - 4 - name.len()];
    let padding = [&PADDING.to_be_bytes()[..], &length(padding.len()), &padding].concat();
    let extensions = [padding, name].concat();
    let body = [&start[..], &length(extensions.len()), &extensions].concat();
    let message = [&[1, 0][..], &length(body.len()), &body].concat();
    message.chunks(record).flat_map(|part| [&[22, 3, 1][..], &length(part.len()), part].concat()).collect()
}

/// A request of some more than that many bytes, its host at the end.
fn request(bytes: usize) -> Vec<u8> {
    let field = "Cookie: session=0123456789abcdef; theme=dark; language=en\r\n";
    let fields = field.repeat(bytes / field.len());
    format!("GET /index.html HTTP/1.1\r\n{fields}Host: www.example.org\r\n\r\n").into_bytes()
}

/// An answer with so many addresses.
fn answer(addresses: u32) -> Vec<u8> {
    let name = Name::new("www.example.org").expect("a name");
    let mut packet = Packet::new_reply(7);
    packet.questions.push(Question::new(name.clone(), QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN), false));
    packet.answers = (0..addresses)
        .map(|address| ResourceRecord::new(name.clone(), CLASS::IN, 300, RData::A(A { address })))
        .collect();
    packet.build_bytes_vec_compressed().expect("an answer")
}

/// Measures what looks for a name in these bytes.
fn find<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    bytes: &[u8],
    what: impl Fn(&[u8]) -> T,
    is_expected: impl Fn(&T) -> bool,
) {
    // To give up is quick.
    assert!(is_expected(&what(bytes)), "{name}: it is not understood");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function(BenchmarkId::new(name, format_args!("{} bytes", bytes.len())), |bencher| {
        bencher.iter(|| what(black_box(bytes)));
    });
}

fn sniff(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sniff");
    let is_name = |told: &Sniffed| matches!(told, Sniffed::Name(_));
    for (name, bytes) in [
        ("TLS, of OpenSSL", OPENSSL),
        ("TLS, of curl", CURL),
        ("TLS, one record", &hello(1_800, 16_384)),
        ("TLS, one record", &hello(16_000, 16_384)),
        ("TLS, records of 100 bytes", &hello(1_800, 100)),
        ("HTTP", &request(0)),
        ("HTTP", &request(1_000)),
        ("HTTP", &request(7_000)),
    ] {
        find(&mut group, name, bytes, stream, is_name);
    }
    let initial = |datagram: &[u8]| Initials::default().add(datagram);
    find(&mut group, "QUIC version 1", &QUIC_1[2..], initial, is_name);
    find(&mut group, "QUIC version 2, more to come", &QUIC_2[2..], initial, |told| *told == Sniffed::More);
    for addresses in [1, 8, 64] {
        let name = format!("DNS answer, {addresses} addresses");
        find(&mut group, &name, &answer(addresses), dns::answer, Option::is_some);
    }
    group.finish();
}

criterion_group! { name = benches; config = brief::criterion(); targets = sniff }
criterion_main!(benches);
