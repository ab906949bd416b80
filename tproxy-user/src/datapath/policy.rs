//! The map of the rules: an array of maps, of which each may have another size. aya
//! makes such arrays only for maps that all have the size of the declaration.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use aya::maps::{Array, ArrayOfMaps, MapData, MapError};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use tproxy_common::abi::map;
use tproxy_common::policy::{Line, layout};

use crate::failure::Failure;

use super::bpffs::PinError;
use super::features::Features;
use super::load::{Datapath, LoadError};

/// `BPF_F_INNER_MAP`: other maps of the array may have other sizes (Linux 5.10).
const INNER_MAP: u32 = 1 << 12;

/// Lines of every image before Linux 5.10: 8 MiB.
const FIXED_LINES: u32 = 65_536;

/// Bytes of a [`Line`].
const LINE_SIZE: u32 = 128;
const _: () = assert!(size_of::<Line>() == LINE_SIZE as usize);

/// Flags, and lines where the kernel wants all images to have as many.
fn kind_of_image(features: Features) -> (u32, Option<u32>) {
    if features.inner_maps_of_any_size() { (INNER_MAP, None) } else { (0, Some(FIXED_LINES)) }
}

/// Makes the map and pins it, where the loader finds it.
///
/// # Errors
///
/// [`LoadError::Map`], [`LoadError::Pin`].
pub(super) fn create(features: Features, pin: &Path) -> Result<(), LoadError> {
    let name = map::POLICY;
    let error = |source| LoadError::Map { name, source };
    let create =
        |attributes: &MapCreate| create_map(attributes).map_err(|source| error(MapError::IoError(source)));
    let (flags, lines) = kind_of_image(features);
    let template = create(&MapCreate {
        map_type: ARRAY,
        value_size: LINE_SIZE,
        max_entries: lines.unwrap_or(1),
        map_flags: flags,
        ..MapCreate::default()
    })?;
    let policy = create(&MapCreate {
        map_type: ARRAY_OF_MAPS,
        value_size: 4,
        max_entries: 1,
        inner_map_fd: template.as_raw_fd().cast_unsigned(),
        ..MapCreate::default()
    })?;
    let path = pin.join(name);
    let pinned = MapData::from_fd(policy).map_err(error)?.pin(&path);
    pinned.map_err(|source| LoadError::Pin(PinError::Io { path, source: io::Error::other(source) }))
}

/// `BPF_MAP_TYPE_ARRAY` and `BPF_MAP_TYPE_ARRAY_OF_MAPS`, of `enum bpf_map_type`.
const ARRAY: u32 = 2;
const ARRAY_OF_MAPS: u32 = 12;

/// The first fields of `union bpf_attr`, as `BPF_MAP_CREATE` has them.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

impl Default for MapCreate {
    fn default() -> Self {
        let mut map_name = [0; 16];
        map_name[..map::POLICY.len()].copy_from_slice(map::POLICY.as_bytes());
        Self {
            map_type: 0,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            map_flags: 0,
            inner_map_fd: 0,
            numa_node: 0,
            map_name,
        }
    }
}

/// Makes a map. Before Linux 5.11 its memory counts as locked, and is refused where root
/// has so much already: then without a limit, as aya makes the others.
fn create_map(attributes: &MapCreate) -> io::Result<OwnedFd> {
    match try_create_map(attributes) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
            try_create_map(attributes)
        }
        made => made,
    }
}

fn try_create_map(attributes: &MapCreate) -> io::Result<OwnedFd> {
    /// `BPF_MAP_CREATE`, of `enum bpf_cmd`.
    const MAP_CREATE: libc::c_int = 0;
    // SAFETY: the kernel reads as many bytes as it is told there are.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, MAP_CREATE, &raw const *attributes, size_of::<MapCreate>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(io::Error::other)?) })
}

/// Rules in the kernel, by which nothing is decided yet.
pub struct Image {
    map: Array<MapData, Line>,
    header: Line,
    bytes: usize,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Image {
    /// Puts them there.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`]: memory; [`LoadError::RulesTooLarge`] before Linux 5.10.
    pub fn new(features: Features, lines: &[Line]) -> Result<Self, LoadError> {
        let error = |source| LoadError::Map { name: map::POLICY, source };
        let (flags, fixed) = kind_of_image(features);
        let count = u32::try_from(lines.len()).unwrap_or(u32::MAX);
        let size = fixed.unwrap_or(count);
        if count > size {
            let mib = |lines: u32| (u64::from(lines) * u64::from(LINE_SIZE)).div_ceil(1 << 20);
            return Err(LoadError::RulesTooLarge(Failure::unsupported(format_args!(
                "the rules take {} MiB, and before Linux 5.10 they may take {}: leave networks out, or use a later kernel",
                mib(count),
                mib(size)
            ))));
        }
        let mut map: Array<MapData, Line> = Array::create(size, flags).map_err(error)?;
        for (index, line) in (0..).zip(lines) {
            map.set(index, line, 0).map_err(error)?;
        }
        let header = lines.first().copied().unwrap_or_default();
        Ok(Self { map, header, bytes: size_of_val(lines) })
    }

    /// Bytes of its lines.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Datapath {
    /// Makes rules the ones that decide, all at once: a packet is decided by those of before
    /// or by these. Lasts until no program reads those of before any more.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`].
    pub fn set_policy(&mut self, image: Image) -> Result<(), LoadError> {
        let name = map::POLICY;
        let error = |source| LoadError::Map { name, source };
        let Image { map: mut lines, mut header, .. } = image;
        self.policies = self.policies.wrapping_add(1);
        header[layout::NUMBER] = self.policies;
        lines.set(0, header, 0).map_err(error)?;
        let map = self.ebpf.map_mut(name).ok_or(LoadError::Missing(name))?;
        let mut policy: ArrayOfMaps<&mut MapData, Array<MapData, Line>> =
            ArrayOfMaps::try_from(map).map_err(error)?;
        policy.set(0, &lines, 0).map_err(error)
    }
}
