//! The clsact qdisc, to which programs are attached where there is no tcx.

use rtnetlink::Handle;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use crate::netlink::{Error, collect};

/// The qdisc of an interface at the clsact hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qdisc {
    /// None.
    Absent,
    /// clsact.
    Clsact,
    /// The older `ingress`: it has no egress side, and keeps clsact out.
    Ingress,
}

/// A filter at the clsact qdisc.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Filter {
    /// At egress (else ingress).
    pub egress: bool,
    /// Its place among the filters.
    pub priority: u16,
    /// Its handle.
    pub handle: u32,
    /// Kind, such as `bpf` or `flower`.
    pub kind: String,
    /// Name of a BPF filter: that of the program, where aya attached it.
    pub name: Option<String>,
}

/// ifindex as the messages have it.
fn header_index(ifindex: u32) -> i32 {
    ifindex.cast_signed()
}

/// What is at the clsact hook of an interface. Needs no privilege.
///
/// # Errors
/// Where the kernel refuses the dump.
pub async fn qdisc(handle: &Handle, ifindex: u32) -> Result<Qdisc, Error> {
    let found = collect("list qdiscs", handle.qdisc().get().index(header_index(ifindex)).execute()).await?;
    Ok(found
        .iter()
        .filter(|message| {
            message.header.index == header_index(ifindex) && message.header.parent == TcHandle::CLSACT
        })
        .map(|message| if kind(message) == "clsact" { Qdisc::Clsact } else { Qdisc::Ingress })
        .next()
        .unwrap_or(Qdisc::Absent))
}

/// Whether an interface has a clsact qdisc. Needs no privilege.
///
/// # Errors
/// Where the kernel refuses the dump.
pub async fn has_clsact(handle: &Handle, ifindex: u32) -> Result<bool, Error> {
    Ok(qdisc(handle, ifindex).await? == Qdisc::Clsact)
}

/// Adds a clsact qdisc to an interface; there must be none.
///
/// # Errors
/// Where the kernel refuses.
pub async fn add_clsact(handle: &Handle, ifindex: u32) -> Result<(), Error> {
    let mut message = TcMessage::with_index(header_index(ifindex));
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let added = crate::netlink::request(handle, request).await;
    added.map_err(|error| Error::new("add a clsact qdisc", error))
}

/// Removes the clsact qdisc of an interface with all its filters; one that is
/// not there is no error.
///
/// # Errors
/// Where the kernel refuses.
pub async fn del_clsact(handle: &Handle, ifindex: u32) -> Result<(), Error> {
    let mut request = handle.qdisc().del(header_index(ifindex));
    let message = request.message_mut();
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    absent_is_done(request.execute().await, "remove the clsact qdisc")
}

/// The filters at both sides of an interface's clsact qdisc.
///
/// # Errors
/// Where the kernel refuses the dump.
pub async fn filters(handle: &Handle, ifindex: u32) -> Result<Vec<Filter>, Error> {
    let mut found = Vec::new();
    if qdisc(handle, ifindex).await? != Qdisc::Clsact {
        return Ok(found);
    }
    for egress in [false, true] {
        let request = handle.traffic_filter(header_index(ifindex)).get();
        let request = if egress { request.egress() } else { request.ingress() };
        let messages = collect("list filters", request.execute()).await?;
        // Some kinds (bpf too) are told twice: the priority alone, then each filter.
        found.extend(
            messages
                .iter()
                .filter(|m| u32::from(m.header.handle) != 0)
                .map(|message| filter(message, egress)),
        );
    }
    Ok(found)
}

/// Removes one filter; one that is not there is no error.
///
/// # Errors
/// Where the kernel refuses.
pub async fn del_filter(handle: &Handle, ifindex: u32, filter: &Filter) -> Result<(), Error> {
    /// `ETH_P_ALL`, which the lower half of `tcm_info` has big-endian.
    const ALL_PROTOCOLS: u16 = 3;
    let mut message = TcMessage::with_index(header_index(ifindex));
    let minor = if filter.egress { TcHandle::MIN_EGRESS } else { TcHandle::MIN_INGRESS };
    message.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor };
    message.header.handle = filter.handle.into();
    message.header.info = u32::from(filter.priority) << 16 | u32::from(ALL_PROTOCOLS.to_be());
    message.attributes.push(TcAttribute::Kind(filter.kind.clone()));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    absent_is_done(crate::netlink::request(handle, request).await, "remove a filter")
}

fn absent_is_done(result: Result<(), rtnetlink::Error>, what: &str) -> Result<(), Error> {
    match result.map_err(|error| Error::new(what, error)) {
        // ENODEV: the interface is gone. EINVAL, ENOENT: no such qdisc, no such filter.
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => Ok(()),
        other => other,
    }
}

fn kind(message: &TcMessage) -> &str {
    message
        .attributes
        .iter()
        .find_map(|attribute| if let TcAttribute::Kind(kind) = attribute { Some(&**kind) } else { None })
        .unwrap_or_default()
}

fn filter(message: &TcMessage, egress: bool) -> Filter {
    let options = message.attributes.iter().flat_map(|attribute| match attribute {
        TcAttribute::Options(options) => &**options,
        _ => &[],
    });
    let name = options.into_iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    });
    Filter {
        egress,
        priority: u16::try_from(message.header.info >> 16).unwrap_or_default(),
        handle: message.header.handle.into(),
        kind: kind(message).to_owned(),
        name,
    }
}
