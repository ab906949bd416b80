//! What `listener::bind` makes.

use std::collections::HashSet;
use std::net::TcpListener;

use tproxy_common::abi::ListenerKind;
use tproxy_user::config::{SourceMode, Steer};
use tproxy_user::failure::Failure;
use tproxy_user::listener::{self, WorkerListeners};

use super::lab::{Host, Lab, ON_PORT, config};

#[test]
#[ignore = "needs root"]
fn one_port_is_fixed_and_the_others_are_free_ones() {
    let lab = Lab::new("listen");
    let mut config = config(SourceMode::Client);
    config.steering.by = Steer::Ebpf;
    config.steering.on_ip4 = [127, 0, 0, 1].into();
    config.steering.on_ip6 = "::1".parse().unwrap();
    config.workers = 3;
    let workers = lab.on(Host::Router, || listener::bind(&config)).unwrap();
    let fixed = |kind| workers[0].iter().any(|of| of.kind == kind && of.addr.port() == ON_PORT);
    assert_eq!(
        ListenerKind::ALL.map(fixed),
        ListenerKind::ALL.map(|kind| kind != ListenerKind::Udp4Df),
        "datagrams with DF come by the programs alone"
    );
    let ports: HashSet<_> = workers
        .iter()
        .flat_map(WorkerListeners::iter)
        .map(|listener| (listener.kind as u32, listener.addr.port()))
        .collect();
    assert_eq!(ports.len(), 3 * ListenerKind::ALL.len());
    config.capture.scope.udp = false;
    config.capture.scope.v6 = false;
    config.steering.on_port += 1;
    let workers = lab.on(Host::Router, || listener::bind(&config)).unwrap();
    assert!(
        workers.iter().flat_map(WorkerListeners::iter).all(|listener| listener.kind == ListenerKind::Tcp4)
    );
}

#[test]
#[ignore = "needs root"]
fn taken_port_is_a_conflict() {
    let lab = Lab::new("taken");
    let _other = lab.on(Host::Router, || TcpListener::bind(("127.0.0.1", ON_PORT)).unwrap());
    let error = lab.on(Host::Router, || listener::bind(&config(SourceMode::Client))).unwrap_err();
    let error = anyhow::Error::from(error);
    let code = error.chain().find_map(|cause| cause.downcast_ref::<Failure>()).map(Failure::exit_code);
    assert_eq!(code, Some(5), "{error:#}");
}
