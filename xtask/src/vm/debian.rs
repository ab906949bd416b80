//! Kernels from Debian's packages: fetched beside the system's own apt, unpacked
//! below `target/vm` and never installed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::kernel::Kernel;
use crate::term::{Step, say};
use crate::workspace;

/// What leads to the newest kernel of a suite. The cloud flavour has every
/// module that the tests need, but not the drivers, which are most of the rest.
const METAPACKAGE: &str = "linux-image-cloud-amd64";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// How long an unpacked kernel is used before apt is asked for a newer one.
const FRESH: Duration = Duration::from_hours(7 * 24);
const LIMIT: Duration = Duration::from_mins(5);

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub(crate) struct Unpacked {
    /// What `uname -r` will say.
    pub(crate) release: String,
    /// The bootable image.
    pub(crate) image: PathBuf,
    /// The directory that `modprobe -d` takes: it has `lib/modules`.
    pub(crate) base: PathBuf,
}

/// Gives a kernel: the one unpacked before, or a newer one where it is older
/// than a week and apt has one.
///
/// # Errors
/// Where there is none and none can be had: no network, no Debian mirror among
/// the system's package sources, or the mirror has dropped the suite.
pub(crate) fn fetch(kernel: Kernel) -> Result<Unpacked> {
    let dir = workspace::target().join("vm").join(kernel.suite());
    fs::create_dir_all(&dir)?;
    let lock = File::create(dir.join("lock"))?;
    lock.lock()?;
    let (root, stamp) = (dir.join("root"), dir.join("root/packages"));
    let age = fs::metadata(&stamp).and_then(|file| file.modified()).ok().and_then(|time| time.elapsed().ok());
    if age.is_none_or(|age| age > FRESH) {
        let refreshed = Apt::new(kernel.suite(), &dir).and_then(|apt| refresh(&apt, &dir, &root, &stamp));
        match refreshed {
            Err(error) if age.is_some() => {
                say(&format!("Linux {}: going on with the one unpacked before: {error:#}", kernel.name()));
            }
            other => other?,
        }
    }
    find(&root)
}

/// Unpacks what apt has, where it is not what is there.
fn refresh(apt: &Apt, dir: &Path, root: &Path, stamp: &Path) -> Result<()> {
    apt.update()?;
    let packages = apt.closure()?;
    let list = packages.join("\n");
    if fs::read_to_string(stamp).is_ok_and(|there| there == list) {
        return Ok(File::options().append(true).open(stamp)?.set_modified(std::time::SystemTime::now())?);
    }
    let (debs, new) = (dir.join("debs"), dir.join("new"));
    for scratch in [&debs, &new] {
        if scratch.exists() {
            fs::remove_dir_all(scratch)?;
        }
        fs::create_dir_all(scratch)?;
    }
    apt.download(&packages, &debs)?;
    for deb in fs::read_dir(&debs)? {
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(deb?.path()).arg(&new);
        Step::new(&format!("unpacking the kernel of {}", apt.suite), "vm-unpack")
            .limit(LIMIT)
            .run(&mut unpack)?;
    }
    let found = find(&new)?;
    let mut depmod = Command::new("/sbin/depmod");
    depmod.arg("-b").arg(&found.base).arg(&found.release);
    Step::new("listing its modules", "vm-depmod").limit(LIMIT).run(&mut depmod)?;
    fs::write(new.join("packages"), list)?;
    if root.exists() {
        fs::remove_dir_all(root)?;
    }
    fs::rename(&new, root)?;
    fs::remove_dir_all(&debs)?;
    Ok(())
}

/// Finds image and modules: below `/boot` and `/lib` in older packages, all
/// below `/usr/lib` in newer ones.
fn find(root: &Path) -> Result<Unpacked> {
    let base = if root.join("usr/lib/modules").is_dir() { root.join("usr") } else { root.to_owned() };
    let modules = base.join("lib/modules");
    let names = fs::read_dir(&modules).with_context(|| format!("no modules in {}", root.display()))?;
    let mut releases: Vec<String> =
        names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    ensure!(releases.len() == 1, "expected the modules of one kernel in {}: {releases:?}", modules.display());
    let release = releases.remove(0);
    let image =
        [root.join("boot").join(format!("vmlinuz-{release}")), modules.join(&release).join("vmlinuz")]
            .into_iter()
            .find(|path| path.is_file())
            .with_context(|| format!("no vmlinuz of {release} in {}", root.display()))?;
    Ok(Unpacked { release, image, base })
}

/// An apt with a source list and state of its own.
struct Apt {
    suite: &'static str,
    dir: PathBuf,
}

impl Apt {
    fn new(suite: &'static str, dir: &Path) -> Result<Self> {
        let dir = dir.join("apt");
        for needed in ["lists/partial", "cache/archives/partial", "preferences.d"] {
            fs::create_dir_all(dir.join(needed))?;
        }
        // No package counts as installed.
        fs::write(dir.join("status"), "")?;
        let source = format!("deb [arch=amd64 signed-by={KEYRING}] {} {suite} main\n", mirror()?);
        fs::write(dir.join("sources.list"), source)?;
        Ok(Self { suite, dir })
    }

    /// One of the apt tools, with the state of this one only.
    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, path) in [
            ("Dir::State", ""),
            ("Dir::State::Lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache"),
            ("Dir::Etc::SourceList", "sources.list"),
            ("Dir::Etc::SourceParts", "/dev/null"),
            ("Dir::Etc::Preferences", "/dev/null"),
            ("Dir::Etc::PreferencesParts", "preferences.d"),
        ] {
            command.arg("-o").arg(format!("{option}={}", self.dir.join(path).display()));
        }
        // The user of apt's sandbox cannot enter every home directory.
        command.args(["-o", "APT::Architecture=amd64", "-o", "APT::Sandbox::User=root"]);
        command.args(["-o", "Acquire::Languages=none"]);
        command.args(["-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"]);
        command.env("LC_ALL", "C").current_dir(&self.dir);
        command
    }

    fn update(&self) -> Result<()> {
        let label = format!("fetching the package lists of {}", self.suite);
        let mut command = self.tool("apt-get");
        command.args(["-q", "-o", "APT::Update::Error-Mode=any", "update"]);
        Step::new(&label, "vm-apt-update").limit(LIMIT).may_fail().run(&mut command).map(drop)
    }

    fn download(&self, packages: &[String], into: &Path) -> Result<()> {
        let label = format!("downloading {}", packages.join(", "));
        let mut command = self.tool("apt-get");
        command.args(["-q", "download"]).args(packages).current_dir(into);
        Step::new(&label, "vm-apt-download").limit(LIMIT).may_fail().run(&mut command).map(drop)
    }

    /// The packages that make up the kernel, as `NAME=VERSION`: from the
    /// metapackage on, those that must be of exactly its version.
    fn closure(&self) -> Result<Vec<String>> {
        let (mut found, mut ahead) = (Vec::new(), vec![METAPACKAGE.to_owned()]);
        while let Some(name) = ahead.pop() {
            let output = self.tool("apt-cache").args(["show", "--no-all-versions", &name]).output()?;
            let stanza = String::from_utf8_lossy(&output.stdout);
            let (version, siblings) =
                siblings(&stanza).with_context(|| format!("{} has no package {name}", self.suite))?;
            let package = format!("{name}={version}");
            if !found.contains(&package) {
                found.push(package);
                ahead.extend(siblings);
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Version of a package, and the packages of that very version that it depends on.
fn siblings(stanza: &str) -> Option<(String, Vec<String>)> {
    let field = |name: &str| {
        stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap_or_default()
    };
    let version = field("Version");
    if version.is_empty() {
        return None;
    }
    let exactly = format!(" (= {version})");
    let siblings =
        field("Depends").split(", ").filter_map(|one| one.strip_suffix(&exactly)).map(str::to_owned);
    Some((version.to_owned(), siblings.collect()))
}

/// The mirror of Debian that the system itself uses.
fn mirror() -> Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)"])
        .args(["Created-By: Packages", "Origin: Debian", "Label: Debian"])
        .output()
        .context("cannot run apt-get")?;
    let uris = String::from_utf8_lossy(&output.stdout);
    match uris.lines().find(|line| !line.is_empty()) {
        Some(uri) => Ok(uri.to_owned()),
        None => {
            bail!("this system's package sources name no mirror of Debian, or `apt-get update` never ran")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_a_kernel_is_of_its_version() {
        let stanza = "Package: linux-image-7.2.13+deb14-cloud-amd64\nVersion: 7.2.13-1\nInstalled-Size: 9\n\
            Depends: dracut | initramfs-tools (>= 0.120), linux-base-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), \
            linux-binary-7.2.13+deb14-cloud-amd64 (= 7.2.13-1), kmod\nDescription: x\n";
        let (version, siblings) = siblings(stanza).expect("a package");
        assert_eq!(version, "7.2.13-1");
        assert_eq!(
            siblings,
            ["linux-base-7.2.13+deb14-cloud-amd64", "linux-binary-7.2.13+deb14-cloud-amd64"]
        );
        assert_eq!(super::siblings(""), None);
    }
}
