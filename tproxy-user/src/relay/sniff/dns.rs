//! Addresses in a DNS answer (RFC 1035, RFC 3596), and the name that was asked for.

use std::net::IpAddr;

use simple_dns::rdata::RData;
use simple_dns::{Name, Packet, PacketFlag, RCODE};

use crate::policy::hostname::normal;

/// Aliases that are followed from the name that was asked for: as many as resolvers do.
const ALIASES: usize = 16;

/// Addresses that are taken of one answer.
const ADDRESSES: usize = 64;

/// What an answer says of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The name that was asked for: the one that a client will use.
    pub name: String,
    /// Its addresses, and for how many seconds.
    pub addresses: Vec<(IpAddr, u32)>,
}

/// Reads an answer; `None`: it says nothing of addresses.
#[must_use]
pub fn answer(bytes: &[u8]) -> Option<Answer> {
    let packet = Packet::parse(bytes).ok()?;
    let answers = packet.has_flags(PacketFlag::RESPONSE) && !packet.has_flags(PacketFlag::TRUNCATION);
    let ([question], true, RCODE::NoError) = (&*packet.questions, answers, packet.rcode()) else {
        return None;
    };
    let name = normal(&question.qname.to_string())?;
    let (mut owner, mut ttl) = (&question.qname, u32::MAX);
    for _ in 0..ALIASES {
        let next = packet.answers.iter().find_map(|record| match &record.rdata {
            RData::CNAME(alias) if same(&record.name, owner) => Some((&alias.0, record.ttl)),
            _ => None,
        });
        let Some((alias, of_alias)) = next else { break };
        (owner, ttl) = (alias, ttl.min(of_alias));
    }
    let address = |data: &RData<'_>| match data {
        RData::A(v4) => Some(IpAddr::V4(v4.address.into())),
        RData::AAAA(v6) => Some(IpAddr::V6(v6.address.into())),
        _ => None,
    };
    let of_owner = packet.answers.iter().filter(|record| same(&record.name, owner));
    let addresses: Vec<_> = of_owner
        .filter_map(|record| Some((address(&record.rdata)?, ttl.min(record.ttl))))
        .take(ADDRESSES)
        .collect();
    (!addresses.is_empty()).then_some(Answer { name, addresses })
}

/// Names are alike whatever the case of their letters.
fn same(one: &Name<'_>, other: &Name<'_>) -> bool {
    let (one, other) = (one.get_labels(), other.get_labels());
    one.len() == other.len()
        && one.iter().zip(other).all(|(one, other)| one.as_ref().eq_ignore_ascii_case(other.as_ref()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use simple_dns::rdata::{A, AAAA, CNAME};
    use simple_dns::{CLASS, QCLASS, QTYPE, Question, ResourceRecord, TYPE};

    use super::*;
    use crate::relay::sniff::check;

    fn name(text: &str) -> Name<'_> {
        Name::new(text).expect(text)
    }

    fn record<'a>(owner: &'a str, ttl: u32, data: RData<'a>) -> ResourceRecord<'a> {
        ResourceRecord::new(name(owner), CLASS::IN, ttl, data)
    }

    fn reply(asked: &str, answers: Vec<ResourceRecord<'_>>) -> Vec<u8> {
        let mut packet = Packet::new_reply(7);
        packet.questions.push(Question::new(
            name(asked),
            QTYPE::TYPE(TYPE::A),
            QCLASS::CLASS(CLASS::IN),
            false,
        ));
        packet.answers = answers;
        packet.build_bytes_vec_compressed().expect("a reply")
    }

    fn v4(last: u8) -> RData<'static> {
        RData::A(A { address: u32::from_be_bytes([192, 0, 2, last]) })
    }

    #[test]
    fn addresses_are_those_of_the_name_that_was_asked_for() {
        let v6 = RData::AAAA(AAAA { address: 1 });
        let bytes = reply(
            "WWW.example",
            vec![
                record("unasked.example", 9, v4(9)),
                record("cdn.test", 50, v4(1)),
                record("www.EXAMPLE", 30, RData::CNAME(CNAME(name("x.test")))),
                record("X.test", 300, RData::CNAME(CNAME(name("cdn.test")))),
                record("cdn.test", 20, v6),
            ],
        );
        let addresses = vec![([192, 0, 2, 1].into(), 30), (std::net::Ipv6Addr::from(1).into(), 20)];
        assert_eq!(answer(&bytes), Some(Answer { name: "www.example".to_owned(), addresses }));
    }

    #[test]
    fn what_is_no_answer_says_nothing() {
        assert_eq!(answer(&[]), None);
        assert_eq!(answer(&reply("a.example", vec![])), None);
        assert_eq!(answer(&reply("a.example", vec![record("b.example", 9, v4(1))])), None);
        let loops = vec![
            record("a.example", 9, RData::CNAME(CNAME(name("b.example")))),
            record("b.example", 9, RData::CNAME(CNAME(name("a.example")))),
        ];
        assert_eq!(answer(&reply("a.example", loops)), None);
        let good = reply("a.example", vec![record("a.example", 9, v4(1))]);
        assert!(answer(&good).is_some());
        // A question, one that is cut off, one with an error.
        for (byte, bits) in [(2, 0x80), (2, 0x02), (3, 0x03)] {
            let mut other = good.clone();
            other[byte] ^= bits;
            assert_eq!(answer(&other), None, "{byte} {bits}");
        }
    }

    proptest! {
        #[test]
        fn what_holds_for_all_holds(bytes: Vec<u8>, at in 0_usize..100, value: u8) {
            check::answer(&bytes);
            let mut altered = reply("a.example", vec![
                record("a.example", 9, RData::CNAME(CNAME(name("b.example")))), record("b.example", 9, v4(1)),
            ]);
            let at = at % altered.len();
            altered[at] = value;
            check::answer(&altered);
        }
    }
}
