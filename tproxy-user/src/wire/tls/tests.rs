//! With a server of rustls on the loopback device.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;

use proptest::prelude::*;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::*;
use crate::config::upstream::{Proxy, Tls};

type Server = StreamOwned<ServerConnection, TcpStream>;

/// A server that has a certificate for `proxy.example.org`, and does `part` with whom it accepts;
/// how it is reached.
fn server(part: impl FnOnce(Server) + Send + 'static) -> (std::net::SocketAddr, Tls, JoinHandle<()>) {
    let own = rcgen::generate_simple_self_signed(["proxy.example.org".to_owned()]).expect("a certificate");
    let authorities = Tls::authorities(own.cert.pem().as_bytes()).expect("a certificate");
    let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key.into())
        .expect("its key");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let serving = std::thread::spawn(move || {
        let stream = listener.accept().expect("a client").0;
        part(StreamOwned::new(ServerConnection::new(Arc::new(config)).expect("valid"), stream));
    });
    let tls = Proxy::parse("https://proxy.example.org:443").expect("a URL").tls.expect("https");
    (address, tls.signed_by(authorities), serving)
}

async fn connect(address: std::net::SocketAddr, tls: &Tls) -> io::Result<Wire> {
    let below = Wire::Plain(tokio::net::TcpStream::connect(address).await?);
    let client = tls.client().expect("an authority");
    Ok(Wire::Tls(Box::new(Session::connect(below, client, tls.name.clone()).await?)))
}

/// All until the other side closes its direction.
async fn read_all(wire: &Wire) -> io::Result<Vec<u8>> {
    let (mut all, mut buffer) = (Vec::new(), [0; 10_000]);
    loop {
        wire.readable().await?;
        match wire.try_read(&mut buffer) {
            Ok(0) => return Ok(all),
            Ok(length) => all.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn close(wire: &Wire) {
    while let Err(error) = wire.try_close() {
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        wire.writable().await.expect("open");
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// The server answers after the client has closed its direction.
    #[test]
    fn bytes_go_both_ways_and_each_way_is_closed_by_itself(
        lengths in prop::collection::vec(0_usize..200_000, 0..6),
    ) {
        let (address, tls, serving) = server(|mut stream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).expect("closed by close_notify");
            stream.write_all(&all).expect("written");
            stream.conn.send_close_notify();
            stream.flush().expect("sent");
            stream.sock.shutdown(Shutdown::Write).expect("shut down");
        });
        let parts: Vec<_> = (1..).zip(lengths).map(|(value, length)| vec![value; length]).collect();
        let back = run(async {
            let wire = connect(address, &tls).await.expect("a handshake");
            for part in &parts {
                wire.write_all(part).await.expect("written");
            }
            close(&wire).await;
            read_all(&wire).await.expect("closed by close_notify")
        });
        serving.join().expect("no panic");
        prop_assert!(back == parts.concat());
    }
}

#[test]
fn what_was_looked_at_is_read_then() {
    let (address, tls, serving) = server(|mut stream| {
        for part in ["HTTP/1.1 200", " OK\r\n\r\n", "the rest"] {
            stream.write_all(part.as_bytes()).expect("written");
            stream.flush().expect("sent");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        stream.conn.send_close_notify();
        stream.flush().expect("sent");
    });
    run(async {
        let wire = connect(address, &tls).await.expect("a handshake");
        let mut buffer = [0; 100];
        let mut seen = 0;
        while seen < 19 {
            let more = wire.peek(seen, &mut buffer).await.expect("open");
            assert!(more > seen, "it waits for more");
            seen = more;
        }
        assert!(buffer.starts_with(b"HTTP/1.1 200 OK\r\n\r\n"));
        let mut head = [0; 19];
        wire.read_exact(&mut head).await.expect("seen");
        assert_eq!(read_all(&wire).await.expect("closed"), b"the rest");
        assert_eq!(wire.peek(0, &mut buffer).await.expect("closed"), 0);
    });
    serving.join().expect("no panic");
}

#[test]
fn what_is_cut_short_does_not_look_complete() {
    let (address, tls, serving) = server(|mut stream| {
        stream.write_all(b"half of").expect("written");
        stream.flush().expect("sent");
        // A FIN, and no close_notify before it.
        stream.sock.shutdown(Shutdown::Write).expect("shut down");
    });
    let read = run(async { read_all(&connect(address, &tls).await.expect("a handshake")).await });
    assert_eq!(read.expect_err("cut").kind(), io::ErrorKind::UnexpectedEof);
    serving.join().expect("no panic");
}

/// Why a client does not go on with a server; `mistake` is what it expects instead.
fn refusal(mistake: impl Fn(Tls) -> Tls) -> io::Error {
    let (address, tls, serving) = server(|mut stream| {
        // Its client breaks off.
        stream.read(&mut [0; 1]).expect_err("an alert");
    });
    let error = run(connect(address, &mistake(tls))).expect_err("refused");
    serving.join().expect("no panic");
    error
}

#[test]
fn a_server_proves_who_it_is() {
    let other = refusal(|mut tls| {
        tls.name = Tls::name("other.example.org").expect("a name");
        tls
    });
    assert!(other.to_string().contains("not valid for name"), "{other}");
    let unknown = refusal(|tls| tls.signed_by(somebody_else()));
    assert!(unknown.to_string().contains("UnknownIssuer"), "{unknown}");
}

fn somebody_else() -> Arc<[CertificateDer<'static>]> {
    let mut params = rcgen::CertificateParams::new([]).expect("no name");
    params.distinguished_name.push(rcgen::DnType::CommonName, "somebody else");
    let key = rcgen::KeyPair::generate().expect("a key");
    let pem = params.self_signed(&key).expect("a certificate").pem();
    Tls::authorities(pem.as_bytes()).expect("one")
}

#[test]
fn a_server_without_tls_is_told() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let serving = std::thread::spawn(move || {
        let mut stream = listener.accept().expect("a client").0;
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").expect("written");
    });
    let tls = Proxy::parse("https://proxy.example.org:443").expect("a URL").tls.expect("https");
    let tls = tls.signed_by(somebody_else());
    let error = run(connect(address, &tls)).expect_err("no TLS");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    serving.join().expect("no panic");
}
