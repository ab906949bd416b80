//! Values of flags and of keys of the config file. Each error says what was
//! expected; the flag or key and what was given are added by those who ask.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use tproxy_common::abi::MAX_WORKERS;

use crate::config::{Kernel, Mark};

/// Longest time-out: timers are exact far beyond it, a longer one is a typing error.
const LONGEST: Duration = Duration::from_hours(366 * 24);

/// A time with its unit, more than zero.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    match duration_or_zero(text)? {
        Duration::ZERO => Err("expected more than zero".to_owned()),
        time => Ok(time),
    }
}

/// A time with its unit.
pub(crate) fn duration_or_zero(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time <= LONGEST => Ok(time),
        Ok(_) => Err("expected at most 366days".to_owned()),
        Err(_) => Err("expected a number with its unit, such as 500ms, 300s, 5m or 1h30m".to_owned()),
    }
}

/// A number, decimal or 0x hexadecimal, as marks are written.
pub(crate) fn number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with('+') => u32::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None => text.parse().ok(),
    };
    parsed.ok_or_else(|| "expected a number of 32 bits, decimal or hexadecimal such as 0x1".to_owned())
}

/// A number in decimal, within bounds.
fn within(text: &str, least: u32, most: u32) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|number| (least..=most).contains(number))
        .ok_or_else(|| format!("expected a number from {least} to {most}"))
}

/// How many there may be, at least one.
pub(crate) fn count(text: &str) -> Result<u32, String> {
    within(text, 1, u32::MAX)
}

/// How many there may be.
pub(crate) fn count_or_zero(text: &str) -> Result<u32, String> {
    within(text, 0, u32::MAX)
}

/// The priority of routing rules, before those of the tables main and default.
pub(crate) fn priority(text: &str) -> Result<u32, String> {
    within(text, 1, 32_765)
}

/// Entries of the flow table.
pub(crate) fn flow_entries(text: &str) -> Result<u32, String> {
    within(text, 1024, 1 << 24)
}

/// Worker threads.
pub(crate) fn workers(text: &str) -> Result<u32, String> {
    within(text, 1, MAX_WORKERS)
}

/// `VALUE[/MASK]`, to be set.
pub(crate) fn mark(text: &str) -> Result<Mark, String> {
    let mark = value_and_mask(text)?;
    if mark.value & mark.mask == 0 {
        return Err(
            "no bit of it is set, so it would match packets without a mark; expected such as 0x1/0x1"
                .to_owned(),
        );
    }
    within_mask(mark)
}

/// `VALUE[/MASK]`, to be compared with: zero, too.
pub(crate) fn any_mark(text: &str) -> Result<Mark, String> {
    let mark = value_and_mask(text)?;
    if mark.mask == 0 {
        return Err("no bit counts, so every packet would match; expected such as 0x1/0x1".to_owned());
    }
    within_mask(mark)
}

/// `VALUE[/MASK]`, whatever that may match.
pub(crate) fn value_and_mask(text: &str) -> Result<Mark, String> {
    Ok(match text.split_once('/') {
        Some((value, mask)) => Mark { value: number(value)?, mask: number(mask)? },
        None => Mark { value: number(text)?, mask: u32::MAX },
    })
}

fn within_mask(mark: Mark) -> Result<Mark, String> {
    let Mark { value, mask } = mark;
    if value & !mask != 0 {
        return Err(format!(
            "the value has bits outside the mask, so nothing would match; expected {:#x}/{mask:#x} or {value:#x}/{:#x}",
            value & mask,
            value | mask
        ));
    }
    Ok(mark)
}

/// One port or an inclusive range.
pub(crate) fn ports(text: &str) -> Result<(u16, u16), String> {
    const EXPECTED: &str = "expected ports from 1 to 65535, such as 53,80,1000-2000";
    let one = |text: &str| text.parse().ok().filter(|port| *port != 0).ok_or_else(|| EXPECTED.to_owned());
    match text.split_once('-') {
        None => one(text).map(|port| (port, port)),
        Some((first, last)) => match (one(first)?, one(last)?) {
            (first, last) if first <= last => Ok((first, last)),
            (first, last) => Err(format!("the range is backwards; expected {last}-{first}")),
        },
    }
}

/// A port, not zero.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| "expected a port from 1 to 65535".to_owned())
}

/// An IP address.
pub(crate) fn ip(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| "expected an IPv4 or IPv6 address, such as 127.0.0.1 or ::1".to_owned())
}

/// A network, or an address as a network of itself alone.
pub(crate) fn cidr(text: &str) -> Result<IpNet, String> {
    let net: Option<IpNet> =
        if text.contains('/') { text.parse().ok() } else { text.parse::<IpAddr>().ok().map(IpNet::from) };
    let net = net.ok_or_else(|| {
        "expected a network such as 192.0.2.0/24 or 2001:db8::/32, or an address".to_owned()
    })?;
    if net.addr() != net.network() {
        return Err(format!(
            "it has bits after the prefix; expected {} or {}",
            net.trunc(),
            IpNet::from(net.addr())
        ));
    }
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let Some(v4) = v6.addr().to_ipv4_mapped()
    {
        return Err(format!("no packet has a mapped address; expected {v4}/{}", v6.prefix_len() - 96));
    }
    Ok(net)
}

/// A routing table of one's own.
pub(crate) fn table(text: &str) -> Result<u32, String> {
    let name = match text.parse::<u32>() {
        Err(_) => return Err("expected the number of a routing table, such as 100".to_owned()),
        Ok(0) => "unspec",
        Ok(253) => "default",
        Ok(254) => "main",
        Ok(255) => "local",
        Ok(table) => return Ok(table),
    };
    Err(format!("that is the table '{name}' of the system; expected a table of its own, such as 100"))
}

/// An interface name or a glob of such.
pub(crate) fn interface(text: &str) -> Result<String, String> {
    // IFNAMSIZ is 16 with the final zero; the kernel refuses '/', ':' and blanks (dev_valid_name).
    if text.is_empty() || text.chars().any(|c| c == '/' || c == ':' || c.is_whitespace()) {
        return Err("expected the name of an interface, such as eth0 or 'wg*'".to_owned());
    }
    if is_glob(text) {
        glob::Pattern::new(text).map_err(|error| format!("expected a glob such as 'wg*': {error}"))?;
    } else if text.len() > 15 {
        return Err("names of interfaces have at most 15 characters".to_owned());
    }
    Ok(text.to_owned())
}

/// Whether a name of [`interface`] is a glob.
pub(crate) fn is_glob(name: &str) -> bool {
    name.contains(['*', '?', '['])
}

/// A pin directory: absolute, with a last part that can name the instance.
pub(crate) fn pin(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let plain = path
        .components()
        .all(|part| matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_)));
    if !path.is_absolute() || path.file_name().is_none() || !plain {
        return Err("expected an absolute path to a directory, such as /sys/fs/bpf/tproxy".to_owned());
    }
    Ok(path)
}

/// A link-layer address.
pub(crate) fn mac(text: &str) -> Result<[u8; 6], String> {
    let mut address = [0; 6];
    let mut parts = text.split(':');
    let complete = address.iter_mut().all(|byte| {
        let digits = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+'));
        digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).map(|value| *byte = value).is_some()
    });
    match parts.next() {
        None if complete => Ok(address),
        _ => Err("expected a link-layer address, such as 02:00:5e:00:53:01".to_owned()),
    }
}

/// A differentiated services codepoint, as a number or by the name that its RFC gives it.
pub(crate) fn dscp(text: &str) -> Result<u8, String> {
    let digit = |digit: u8, most: u8| digit.checked_sub(b'0').filter(|value| *value <= most);
    let value = match text.to_ascii_lowercase().as_bytes() {
        b"be" => Some(0),
        b"le" => Some(1),
        b"va" => Some(44),
        b"ef" => Some(46),
        [b'c', b's', class] => digit(*class, 7).map(|class| class * 8),
        [b'a', b'f', class, drop] => digit(*class, 4)
            .zip(digit(*drop, 3))
            .filter(|(class, drop)| *class > 0 && *drop > 0)
            .map(|(class, drop)| class * 8 + drop * 2),
        _ => text.parse().ok().filter(|value| *value < 64),
    };
    value.ok_or_else(|| {
        "expected a number from 0 to 63, or a name: cs0 to cs7, af11 to af43, ef, va, le or be".to_owned()
    })
}

/// Where flows are diverted to.
pub(crate) fn target(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .ok()
        .filter(|target: &SocketAddr| target.port() != 0)
        .ok_or_else(|| "expected an address and a port, such as 127.0.0.53:53 or [::1]:53".to_owned())
}

/// `X.Y`.
pub(crate) fn kernel(text: &str) -> Result<Kernel, String> {
    text.split_once('.')
        .and_then(|(major, minor)| Some(Kernel { major: major.parse().ok()?, minor: minor.parse().ok()? }))
        .ok_or_else(|| "expected a kernel version, such as 5.10".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks() {
        assert_eq!(mark("0x1/0x1"), Ok(Mark { value: 1, mask: 1 }));
        assert_eq!(mark("16"), Ok(Mark { value: 16, mask: u32::MAX }));
        assert_eq!(mark("0xFF/255"), Ok(Mark { value: 255, mask: 255 }));
        assert!(mark("0x3/0x1").expect_err("bits outside").contains("expected 0x1/0x1 or 0x3/0x3"));
        for bad in ["", "0", "0/1", "0x", "0x+1", "x", "-1", "0x100000000", "1/", "1/0"] {
            assert!(mark(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn marks_to_compare_with() {
        assert_eq!(any_mark("0/0xff"), Ok(Mark { value: 0, mask: 0xff }));
        assert_eq!(any_mark("0"), Ok(Mark { value: 0, mask: u32::MAX }));
        assert_eq!(any_mark("0x1/0x3"), mark("0x1/0x3"));
        for bad in ["", "0/0", "2/1", "x"] {
            assert!(any_mark(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn packet_fields() {
        assert_eq!(mac("02:00:5e:00:53:Fe"), Ok([2, 0, 0x5e, 0, 0x53, 0xfe]));
        for bad in ["", "02:00:5e:00:53", "02:00:5e:00:53:01:02", "02:00:5e:00:53:1", "2:0:0:0:0:+1"] {
            assert!(mac(bad).is_err(), "{bad}");
        }
        // RFC 2474, 2597, 3246, 5865 and 8622.
        for (name, value) in
            [("0", 0), ("63", 63), ("EF", 46), ("cs1", 8), ("af41", 34), ("va", 44), ("le", 1)]
        {
            assert_eq!(dscp(name), Ok(value), "{name}");
        }
        for bad in ["", "64", "cs8", "af44", "af51", "af01", "af10", "af", "csx", "é"] {
            assert!(dscp(bad).is_err(), "{bad}");
        }
        assert!(target("127.0.0.53:53").is_ok() && target("[::1]:53").is_ok());
        for bad in ["", "127.0.0.1", "127.0.0.1:0", "::1:53", "localhost:53"] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_within_bounds() {
        assert_eq!(priority("32765"), Ok(32_765));
        assert!(priority("32766").expect_err("too much").contains("from 1 to 32765"));
        assert!(count("0").is_err() && count_or_zero("0").is_ok() && count("-1").is_err());
        assert!(flow_entries("1023").is_err() && workers("65").is_err());
    }

    #[test]
    fn port_lists() {
        assert_eq!(ports("53"), Ok((53, 53)));
        assert_eq!(ports("1000-2000"), Ok((1000, 2000)));
        assert!(ports("20-10").expect_err("backwards").contains("10-20"));
        for bad in ["", "0", "65536", "-", "1-", "-2", "a", "1-2-3"] {
            assert!(ports(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn networks() {
        assert_eq!(cidr("10.0.0.1").map(|net| net.to_string()), Ok("10.0.0.1/32".to_owned()));
        assert_eq!(cidr("2001:db8::/32").map(|net| net.to_string()), Ok("2001:db8::/32".to_owned()));
        assert!(cidr("10.0.0.1/8").expect_err("host bits").contains("10.0.0.0/8 or 10.0.0.1/32"));
        assert!(cidr("::ffff:10.0.0.0/104").expect_err("mapped").contains("10.0.0.0/8"));
        assert_eq!(cidr("::/0").map(|net| net.to_string()), Ok("::/0".to_owned()));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "eth0", "::/129"] {
            assert!(cidr(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(duration("300s"), Ok(Duration::from_mins(5)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_mins(90)));
        assert_eq!(duration_or_zero("0s"), Ok(Duration::ZERO));
        for bad in ["0s", "5", "s", "-1s", "2years", ""] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names() {
        for good in ["eth0", "wg*", "br-lan", "eth0.100", "e[0-9]*"] {
            assert!(interface(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "a/b", "0123456789abcdef", "e[0"] {
            assert!(interface(bad).is_err(), "{bad}");
        }
        assert!(pin("/sys/fs/bpf/tproxy").is_ok());
        for bad in ["tproxy", "/", "/sys/fs/bpf/..", "/sys/../x"] {
            assert!(pin(bad).is_err(), "{bad}");
        }
        assert_eq!(kernel("5.10"), Ok(Kernel { major: 5, minor: 10 }));
        assert!(kernel("5.7") < kernel("5.10") && kernel("five").is_err());
        assert!(table("254").expect_err("main").contains("main"));
    }
}
