//! The default object needs for its core only what Linux 5.7 has. That kernel
//! is in no distribution any more, so the object itself is checked: helpers,
//! instructions, map types and program types. No root, no kernel.
//!
//! Limits are those of Linux 5.7's `include/uapi/linux/bpf.h`. They do not
//! tell that TC programs can read a socket map and call `skb_change_head` from
//! 5.8 on only: before, the settings `listener_by_tuple` and `link_headers` make
//! these branches dead, and the verifier skips them.

use std::collections::{BTreeSet, HashSet};

use aya_obj::generated::bpf_insn;
use aya_obj::programs::CgroupSockAttachType;
use aya_obj::{Object, ProgramSection};
use tproxy_common::abi::program;

static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tproxy.o"));

/// `sk_assign`, which 5.7 brought as its last helper (`__BPF_FUNC_MAPPER`).
const LAST_HELPER: i32 = 124;
/// `ktime_get_coarse_ns` (5.11): before, the setting `coarse_clock` makes its call
/// dead, and the verifier does not ask whether it knows the helper.
const BEHIND_A_SETTING: i32 = 160;
/// `BPF_MAP_TYPE_STRUCT_OPS`, the last of `enum bpf_map_type`.
const LAST_MAP_TYPE: u32 = 26;
/// `BPF_F_MMAPABLE`, the highest map flag.
const LAST_MAP_FLAG: u32 = 1 << 10;

/// The object with each program's subprograms appended to it.
fn object() -> Object {
    let mut object = Object::parse(OBJECT).expect("an eBPF object");
    let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
    object.relocate_calls(&text).expect("calls between known functions");
    object
}

/// Programs that newer kernels alone are given: `sk_lookup` (5.9), faithful
/// handshakes (TC programs may call `skb_change_head` from 5.8 on), notes at sockets (5.9).
const NOT_CORE: [&str; 4] = [program::LOOKUP, program::ADMIT, program::QUEUE, program::GROUP];

/// Name and instructions of every program of the core.
fn core(object: &Object) -> Vec<(&str, &[bpf_insn])> {
    let mut programs: Vec<_> = object
        .programs
        .iter()
        .filter(|(name, _)| !NOT_CORE.contains(&name.as_str()))
        .map(|(name, of)| (name.as_str(), object.functions[&of.function_key()].instructions.as_slice()))
        .collect();
    programs.sort_unstable_by_key(|(name, _)| *name);
    programs
}

/// Why Linux 5.7 does not know this instruction; `None` where it does.
fn too_new(insn: bpf_insn) -> Option<&'static str> {
    const CALL: u8 = 0x85;
    let (class, operation, mode) = (insn.code & 0x07, insn.code & 0xf0, insn.code & 0xe0);
    match class {
        // LD: a wide constant; sources 0 to 2 are a number, a map, a value in a map.
        0x00 if insn.code == 0x18 && insn.src_reg() > 2 => Some("a pointer to a kernel symbol or function"),
        // LDX, mode MEMSX.
        0x01 if mode == 0x80 => Some("a load with sign (6.6)"),
        // STX, mode ATOMIC; only the addition without result is older.
        0x03 if mode == 0xc0 && insn.imm != 0 => Some("an atomic operation other than BPF_XADD (5.12)"),
        // ALU, ALU64: MOV, DIV and MOD with an offset are signed.
        0x04 | 0x07 if matches!(operation, 0x30 | 0x90 | 0xb0) && insn.off != 0 => {
            Some("signed arithmetic (6.6)")
        }
        0x07 if operation == 0xd0 => Some("an unconditional byte swap (6.6)"),
        0x06 if operation == 0x00 => Some("a long jump (6.6)"),
        0x05 if insn.code == CALL
            && insn.src_reg() == 0
            && insn.imm > LAST_HELPER
            && insn.imm != BEHIND_A_SETTING =>
        {
            Some("a helper that came later")
        }
        0x05 if insn.code == CALL && insn.src_reg() > 1 => Some("a kernel function (5.13)"),
        0x05 if operation == 0xe0 => Some("a conditional jump of 6.10"),
        _ => None,
    }
}

#[test]
fn programs_are_of_types_that_linux_5_7_has() {
    let object = object();
    let names: BTreeSet<&str> = object.programs.keys().map(String::as_str).collect();
    let core =
        [program::CAPTURE, program::UPLINK, program::NAT, program::REPLY, program::OWN, program::LOOPBACK];
    assert_eq!(names, core.into_iter().chain(NOT_CORE).collect());
    for (name, program) in &object.programs {
        let expected = match name.as_str() {
            program::LOOKUP => ProgramSection::SkLookup,
            program::QUEUE => ProgramSection::SocketFilter,
            program::GROUP => ProgramSection::CgroupSock { attach_type: CgroupSockAttachType::SockCreate },
            _ => ProgramSection::SchedClassifier,
        };
        assert_eq!(
            std::mem::discriminant(&program.section),
            std::mem::discriminant(&expected),
            "{name}: {:?}",
            program.section
        );
    }
}

#[test]
fn the_core_needs_nothing_newer_than_linux_5_7() {
    let object = object();
    for (name, instructions) in core(&object) {
        let mut steps = instructions.iter().copied().enumerate();
        while let Some((at, insn)) = steps.next() {
            if let Some(why) = too_new(insn) {
                panic!("{name}, instruction {at}: {why}: {insn:?}");
            }
            // The second half of a wide constant is none.
            if insn.code == 0x18 {
                steps.next();
            }
        }
    }
}

/// So that a new helper is noticed, and the kernel looked up that brought it
/// to TC programs: the numbers alone say only that some program type has it.
#[test]
fn the_core_calls_these_helpers() {
    let object = object();
    let helpers: BTreeSet<i32> = core(&object)
        .iter()
        .flat_map(|(_, instructions)| *instructions)
        .filter(|insn| insn.code == 0x85 && insn.src_reg() == 0)
        .map(|insn| insn.imm)
        .collect();
    let known = [
        (1, "map_lookup_elem"),
        (2, "map_update_elem"),
        (5, "ktime_get_ns, 4.1"),
        (9, "skb_store_bytes, 4.1"),
        (10, "l3_csum_replace, 4.1"),
        (11, "l4_csum_replace, 4.1"),
        (23, "redirect, 4.4"),
        (26, "skb_load_bytes, 4.5"),
        (28, "csum_diff, 4.6"),
        (32, "skb_change_type, 4.8"),
        (39, "skb_pull_data, 4.9"),
        (43, "skb_change_head, 4.10"),
        (47, "get_socket_uid, 4.12"),
        (68, "skb_load_bytes_relative, 4.18"),
        (83, "skb_ancestor_cgroup_id, 4.19; with CONFIG_SOCK_CGROUP_DATA"),
        (85, "sk_lookup_udp, 4.20"),
        (86, "sk_release, 4.20"),
        (95, "sk_fullsock, 5.1"),
        (99, "skc_lookup_tcp, 5.2"),
        (107, "sk_storage_get, 5.2"),
        (124, "sk_assign, 5.7"),
        (BEHIND_A_SETTING, "ktime_get_coarse_ns, 5.11"),
    ];
    assert_eq!(helpers, known.iter().map(|(number, _)| *number).collect::<BTreeSet<_>>(), "known: {known:?}");
}

#[test]
fn maps_are_of_types_that_linux_5_7_has() {
    let object = object();
    assert!(!object.maps.is_empty());
    for (name, map) in &object.maps {
        assert!(map.map_type() <= LAST_MAP_TYPE, "{name} has type {}", map.map_type());
        assert!(map.map_flags() < LAST_MAP_FLAG << 1, "{name} has flags {:#x}", map.map_flags());
        assert_eq!(map.map_extra(), 0, "{name}: map_extra came with 5.16");
    }
}

/// Bytes of stack that a function of a program uses, as the verifier counts
/// them: the lowest offset from the frame pointer.
fn frame(instructions: &[bpf_insn]) -> usize {
    const FRAME: u8 = 10;
    let mut lowest = 0;
    // Registers that hold the frame pointer itself, until something is added.
    let mut copies = HashSet::from([FRAME]);
    for insn in instructions {
        let (class, to, from) = (insn.code & 0x07, insn.dst_reg(), insn.src_reg());
        match class {
            0x01 if from == FRAME => lowest = lowest.min(i32::from(insn.off)),
            0x02 | 0x03 if to == FRAME => lowest = lowest.min(i32::from(insn.off)),
            // r = frame pointer
            0x07 if insn.code == 0xbf && from == FRAME => {
                copies.insert(to);
                continue;
            }
            // r += number
            0x07 if insn.code == 0x07 && copies.contains(&to) => lowest = lowest.min(insn.imm),
            _ => {}
        }
        if matches!(class, 0x00 | 0x01 | 0x04 | 0x07) && to != FRAME {
            copies.remove(&to);
        }
    }
    usize::try_from(-lowest).expect("offsets below the frame pointer")
}

/// The deepest chain of calls from the function at `start`: bytes, and where its functions begin.
fn deepest(instructions: &[bpf_insn], starts: &BTreeSet<usize>, start: usize) -> (usize, Vec<usize>) {
    let end = starts.range(start + 1..).next().copied().unwrap_or(instructions.len());
    let body = &instructions[start..end];
    let called = body.iter().enumerate().filter_map(|(at, insn)| target(start + at, *insn));
    let (below, mut chain) = called
        .map(|callee| deepest(instructions, starts, callee))
        .max_by_key(|(bytes, _)| *bytes)
        .unwrap_or_default();
    chain.insert(0, start);
    // check_max_stack_depth, kernel/bpf/verifier.c of 5.7: each frame in steps of 32 bytes.
    (frame(body).max(1).next_multiple_of(32) + below, chain)
}

/// Where a call to a function of the program leads.
fn target(at: usize, insn: bpf_insn) -> Option<usize> {
    (insn.code == 0x85 && insn.src_reg() == 1)
        .then(|| at.checked_add_signed(insn.imm as isize + 1).expect("inside the program"))
}

/// All frames of a chain of calls share `MAX_BPF_STACK`. Newer kernels
/// count less, so what loads here may be too deep for an older one.
#[test]
fn no_chain_of_calls_needs_more_stack_than_there_is() {
    const MAX_BPF_STACK: usize = 512;
    const MAX_CALL_FRAMES: usize = 8;
    let object = object();
    for (name, instructions) in core(&object) {
        let calls = instructions.iter().enumerate().filter_map(|(at, insn)| target(at, *insn));
        let starts: BTreeSet<usize> = calls.chain([0]).collect();
        let (bytes, chain) = deepest(instructions, &starts, 0);
        assert!(
            bytes <= MAX_BPF_STACK && chain.len() <= MAX_CALL_FRAMES,
            "{name}: {bytes} bytes in the chain of the functions at {chain:?}"
        );
    }
}

#[test]
fn newer_instructions_are_told_apart() {
    let insn = |code, src, off, imm| bpf_insn {
        code,
        off,
        imm,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, src),
    };
    // r0 += r1; lock *(u64 *)(r1 + 0) += r2; call sk_assign; call to a function of the program.
    for old in [insn(0x0f, 1, 0, 0), insn(0xdb, 2, 0, 0), insn(0x85, 0, 0, 124), insn(0x85, 1, 0, 500)] {
        assert_eq!(too_new(old), None, "{old:?}");
    }
    // ktime_get_boot_ns; a kfunc; atomic fetch-and-add; movsx; s/; bswap; gotol; ldsx.
    for new in [
        insn(0x85, 0, 0, 125),
        insn(0x85, 2, 0, 1),
        insn(0xdb, 2, 0, 1),
        insn(0xbf, 1, 8, 0),
        insn(0x3f, 1, 1, 0),
        insn(0xd7, 0, 0, 16),
        insn(0x06, 0, 0, 9),
        insn(0x91, 1, 0, 0),
    ] {
        assert!(too_new(new).is_some(), "{new:?}");
    }
}
