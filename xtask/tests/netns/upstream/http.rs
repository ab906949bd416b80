//! What curl does through each server: HTTP of two versions, and a large file each way.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use xtask::lab::command::{self, Output};
use xtask::lab::pace::{self, share};
use xtask::lab::peer::TcpServer;
use xtask::lab::{Cmd, Daemon, Family, Lab, server, upstream, url};

use super::secure::certified;
use super::{dante, exit, through};
use crate::common::{Scenarios, at};

pub(super) const SCENARIOS: Scenarios = &[
    ("large_files_by_dante", |lab, family| {
        large_files(lab, family, ("socks5", "dante"), &[dante(lab, family)?])
    }),
    ("large_files_by_microsocks", |lab, family| {
        let microsocks = upstream::microsocks(lab, &lab.server, exit(family), false)?;
        large_files(lab, family, ("socks5", "microsocks"), &[microsocks])
    }),
    ("large_files_by_shadowsocks", |lab, family| {
        large_files(
            lab,
            family,
            ("socks5", "shadowsocks"),
            &upstream::shadowsocks(lab, &lab.server, exit(family))?,
        )
    }),
    ("large_files_by_v2ray", |lab, family| {
        large_files(
            lab,
            family,
            ("socks5", "v2ray"),
            &[upstream::v2ray(lab, &lab.server, exit(family), &[])?],
        )
    }),
    ("large_files_by_tinyproxy", |lab, family| {
        large_files(
            lab,
            family,
            ("http", "tinyproxy"),
            &[upstream::tinyproxy(lab, &lab.server, exit(family), false)?],
        )
    }),
    ("large_files_by_squid", |lab, family| {
        large_files(lab, family, ("http", "squid"), &[upstream::squid(lab, &lab.server, exit(family), None)?])
    }),
    ("large_files_by_squid_inside_tls", |lab, family| {
        let pem = certified(lab, &[&family.server().to_string()])?;
        let squid = upstream::squid(lab, &lab.server, exit(family), Some(&pem))?;
        large_files(lab, family, ("https", "squid"), &[squid])
    }),
];

/// Where the web server speaks HTTP/2 without TLS.
const H2C: u16 = 82;

/// A web server for [`versions`].
pub(super) fn server(lab: &Lab) -> Result<Daemon> {
    server::web_with_http2(lab, &lab.server, &[80], &[443], &[H2C])
}

/// Pages of several servers by both versions, and all of a server and version over one connection.
pub(super) fn versions(lab: &Lab, family: Family, exit: &Daemon) -> Result<()> {
    let curl = |flags: &str, url: &str| {
        const TOLD: [&str; 2] = ["-w", "%{http_version} %{num_connects}\n"];
        let curl = lab.client.cmd("curl").args(["-sS", "-m", &pace::seconds(10)]).args(TOLD);
        curl.args(flags.split(' ')).arg(url).check().with_context(|| exit.describe())
    };
    for to in [family.anywhere(80), family.anywhere(81)] {
        for (scheme, port, flags, version, pages) in [
            ("http", 80, "--http1.1", "1.1", 5),
            // curl 7.88 fails at a second one over the same connection, whatever is between (its issue 10634).
            ("http", H2C, "--http2-prior-knowledge", "2", 1),
            ("https", 443, "--insecure --http2", "2", 5),
        ] {
            let got = curl(flags, &format!("{scheme}://{}/?[1-{pages}]", at(to, port)))?;
            let seen = got.stdout.lines().next().unwrap_or_default();
            // All of them see the same port, which is that of one connection.
            let all = |connects: &str| format!("{seen}\n{version} {connects}\n");
            let expected = all("1") + &all("0").repeat(pages - 1);
            ensure!(got.stdout == expected, "expected\n{expected}of {}", got.describe());
            let [host, _, address, at_port] = seen.split(' ').collect::<Vec<_>>()[..] else {
                bail!("no page: {}", got.describe());
            };
            ensure!(
                host == family.server().to_string() || host == to.to_string(),
                "the web server sees {seen}; {}",
                exit.describe()
            );
            let expected = (to.to_string(), port.to_string());
            ensure!((address, at_port) == (&expected.0, &expected.1), "another server answers: {seen}");
        }
    }
    // Many at once, as streams of one connection.
    let many = format!("https://{}/?[1-50]", at(family.anywhere(80), 443));
    let got = curl("--insecure --http2 --parallel", &many)?;
    let count = |told: &str| got.stdout.lines().filter(|line| *line == told).count();
    ensure!(
        (count("2 1"), count("2 0")) == (1, 49),
        "expected 50 streams of one connection: {}",
        got.describe()
    );
    Ok(())
}

/// Environment variable: bytes of the file that goes each way. Where it is set, the time that it took is printed.
const TRANSFER: &str = "TPROXY_LAB_TRANSFER";
const TRANSFER_DEFAULT: u64 = 16 << 20;

/// A file of random bytes, without a name, for all scenarios of this process.
struct Original {
    file: File,
    length: u64,
    /// As `sha256sum` prints it.
    sum: String,
}

impl Original {
    fn get() -> Result<&'static Self> {
        static ORIGINAL: LazyLock<Result<Original>> = LazyLock::new(Original::new);
        ORIGINAL.as_ref().map_err(|error| anyhow!("no file to transfer: {error:#}"))
    }

    fn new() -> Result<Self> {
        let length = match std::env::var(TRANSFER) {
            Err(_) => share(TRANSFER_DEFAULT),
            Ok(bytes) => bytes
                .parse()
                .with_context(|| format!("{TRANSFER} is {bytes:?}; expected a number of bytes"))?,
        };
        let mut file = command::scratch()?;
        io::copy(&mut File::open("/dev/urandom")?.take(length), &mut file)?;
        let mut original = Self { file, length, sum: String::new() };
        let sum = Cmd::host("sha256sum").arg(original.path()).timeout(original.patience()).check()?;
        sum_of(&sum.stdout).clone_into(&mut original.sum);
        Ok(original)
    }

    /// Where other programs find it.
    fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// How long a transfer may take: as long as at 4 MiB/s, beside all that runs at the same time.
    fn patience(&self) -> Duration {
        Duration::from_secs(20 + self.length / (4 << 20))
    }
}

fn sum_of(told: &str) -> &str {
    told.split_whitespace().next().unwrap_or_default()
}

/// A file that nginx has arrives at curl, and one that curl has arrives at a server, by their checksums.
fn large_files(lab: &Lab, family: Family, (scheme, name): (&str, &str), exit: &[Daemon]) -> Result<()> {
    const WEB: u16 = 80;
    const INBOX: u16 = 8080;
    let original = Original::get()?;
    let web = server::web(lab, &lab.server, &[WEB])?;
    std::os::unix::fs::symlink(original.path(), lab.dir().join("www/large"))?;
    let _inbox = inbox(lab, at(family.anywhere(80), INBOX))?;
    let _proxy = through(lab, family, scheme, "")?;
    let transfer = |way: &str, script: &str, url: &str| -> Result<Output> {
        let limit = original.patience();
        let script = format!("curl -sS -m {} -w '%{{stderr}}%{{time_total}}' {script}", limit.as_secs());
        let command = lab.client.cmd("sh").args(["-c", &script, url]).arg(original.path()).timeout(limit);
        let output = command.check()?;
        ensure!(
            sum_of(&output.stdout) == original.sum,
            "{way}: expected {} bytes with SHA-256 {}, {}; {}",
            original.length,
            original.sum,
            output.describe(),
            exit[0].describe()
        );
        if std::env::var_os(TRANSFER).is_some() {
            let (family, length) = (family.name(), original.length);
            eprintln!("{name}, {family}: {length} bytes {way} in {} s", output.stderr);
        }
        Ok(output)
    };
    transfer("down", "\"$0\" | sha256sum", &url(family.anywhere(80), WEB, "/files/large"))?;
    ensure!(!web.log().contains(&family.client().to_string()), "{}", web.describe());
    let answer =
        transfer("up", "-H Expect: --upload-file \"$1\" \"$0\"", &url(family.anywhere(80), INBOX, "/large"))?;
    ensure!(
        !answer.stdout.contains(&family.client().to_string()),
        "it comes past the server: {}",
        answer.describe()
    );
    Ok(())
}

/// A web server that answers a PUT with the checksum of what it got and the client's address.
fn inbox(lab: &Lab, address: SocketAddr) -> Result<TcpServer> {
    TcpServer::start(&lab.server, address, |stream, client| {
        // A failure shows at the client.
        let _ = checksum(&stream).and_then(|sum| {
            let answer = format!("{sum} {client}\n");
            let length = answer.len();
            write!(&stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{answer}")
        });
    })
}

/// The SHA-256 of a request's body.
fn checksum(stream: &TcpStream) -> io::Result<String> {
    let mut request = BufReader::with_capacity(1 << 16, stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        request.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some(("Content-Length", value)) => length = value.parse().map_err(io::Error::other)?,
            None if line.trim_end().is_empty() => break,
            _ => {}
        }
    }
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    // What is piped in is closed with that.
    let copied = sum.stdin.take().map_or(Ok(0), |mut stdin| io::copy(&mut request.take(length), &mut stdin));
    let sum = sum.wait_with_output()?;
    copied?;
    Ok(sum_of(&String::from_utf8_lossy(&sum.stdout)).to_owned())
}
