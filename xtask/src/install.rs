//! `cargo xtask install`: puts the program and what belongs to it in place.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::{AccessFlags, access};

use crate::{
    build::{self, Profile},
    workspace,
};

const UNIT: &str = include_str!("../assets/tproxy.service");
const OPTIONS: &str = include_str!("../assets/tproxy.default");
const CONFIG: &str = include_str!("../assets/tproxy.toml");

/// Where `build-ebpf` puts the program, so that `sudo tproxy-user` finds it.
const LOCAL_BIN: &str = "/usr/local/bin";

/// Flags of `cargo xtask install`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where programs, manual pages, completions and the systemd unit go
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// Where the options file and the config file go (existing ones are kept)
    #[arg(long, default_value = "/etc")]
    sysconfdir: PathBuf,
    /// A directory to put in front of every path, for packagers
    #[arg(long, default_value = "/")]
    destdir: PathBuf,
    /// Only say what would be installed
    #[arg(short = 'n', long)]
    dry_run: bool,
}

/// One file to install.
struct Item {
    path: PathBuf,
    mode: u32,
    content: Vec<u8>,
    /// A file that people edit: one that exists is left as it is.
    keep: bool,
}

impl Item {
    fn new(path: PathBuf, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        Self { path, mode, content: content.into(), keep: false }
    }
}

/// Runs the task.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !args.prefix.is_absolute() || !args.sysconfdir.is_absolute() {
        bail!("--prefix and --sysconfdir are absolute paths; --destdir goes in front of them");
    }
    let program = build::ensure_all(Profile::Release)?.tproxy_user;
    for item in plan(args, &program)? {
        let path = under(&args.destdir, &item.path);
        if item.keep && path.exists() {
            println!("kept      {}", path.display());
        } else if args.dry_run {
            println!("would install {}", path.display());
        } else {
            put(&path, item.mode, &item.content)?;
            println!("installed {}", path.display());
        }
    }
    if !args.dry_run && args.destdir == Path::new("/") {
        println!(
            "next: name the interfaces in {}, then: systemctl daemon-reload && systemctl enable --now tproxy",
            args.sysconfdir.join("default/tproxy").display()
        );
    }
    Ok(())
}

/// Everything that belongs to an installation; the program itself writes its
/// manual pages and completions.
fn plan(args: &Args, program: &Path) -> Result<Vec<Item>> {
    let bin = args.prefix.join("bin/tproxy-user");
    let share = args.prefix.join("share");
    let binary = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let mut items = vec![Item::new(bin.clone(), 0o755, binary)];
    for (name, page) in manual_pages(program)? {
        let section = name.rsplit('.').next().unwrap_or("8");
        let path = share.join(format!("man/man{section}")).join(&name);
        items.push(Item::new(path, 0o644, page));
    }
    for (shell, path) in [
        ("bash", "bash-completion/completions/tproxy-user"),
        ("zsh", "zsh/site-functions/_tproxy-user"),
        ("fish", "fish/vendor_completions.d/tproxy-user.fish"),
    ] {
        let script = completions(program, shell)?;
        items.push(Item::new(share.join(path), 0o644, script));
    }
    let options = args.sysconfdir.join("default/tproxy");
    let unit = UNIT
        .replace("@PROGRAM@", &bin.display().to_string())
        .replace("@OPTIONS@", &options.display().to_string());
    let unit_path = args.prefix.join("lib/systemd/system/tproxy.service");
    items.push(Item::new(unit_path, 0o644, unit));
    items.push(Item { keep: true, ..Item::new(options, 0o644, OPTIONS) });
    let config = args.sysconfdir.join("tproxy/tproxy.toml");
    items.push(Item { keep: true, ..Item::new(config, 0o644, CONFIG) });
    Ok(items)
}

/// The manual pages that the program writes: name and content.
fn manual_pages(program: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let directory = workspace::target().join("man");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&directory)?;
    output(Command::new(program).arg("man").arg(&directory))?;
    let mut pages = Vec::new();
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        if let Some(name) = path.file_name().and_then(|name| name.to_str()) {
            pages.push((name.to_owned(), fs::read(&path)?));
        }
    }
    if pages.is_empty() {
        bail!("`tproxy-user man {}` wrote no page", directory.display());
    }
    pages.sort();
    Ok(pages)
}

fn completions(program: &Path, shell: &str) -> Result<Vec<u8>> {
    let script = output(Command::new(program).args(["completions", shell]))?;
    if script.is_empty() {
        bail!("`tproxy-user completions {shell}` printed nothing");
    }
    Ok(script)
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

/// Puts the program where `sudo tproxy-user` finds it, or says how to.
///
/// # Errors
/// The directory can be written, but the copy fails.
pub(crate) fn into_path(program: &Path) -> Result<()> {
    let installed = Path::new(LOCAL_BIN).join("tproxy-user");
    let content = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    if fs::read(&installed).is_ok_and(|old| old == content) {
        println!("{} is up to date: sudo tproxy-user --iface eth0", installed.display());
    } else if access(LOCAL_BIN, AccessFlags::W_OK).is_ok() {
        put(&installed, 0o755, &content)?;
        println!("installed {}: sudo tproxy-user --iface eth0", installed.display());
    } else {
        println!("built {}; to have it in sudo's PATH: sudo install {0} {LOCAL_BIN}/", program.display());
    }
    Ok(())
}

/// `path`, which is absolute, below `directory`.
fn under(directory: &Path, path: &Path) -> PathBuf {
    directory.join(path.strip_prefix("/").unwrap_or(path))
}

/// Replaces a file at once, also while the old one is running.
fn put(path: &Path, mode: u32, content: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let new = PathBuf::from(name);
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        file.write_all(content)?;
        // The mode given at opening is cut by the umask.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    if let Err(error) = write() {
        let hint = if error.kind() == io::ErrorKind::PermissionDenied {
            "; run it as root, or choose --prefix, --sysconfdir or --destdir"
        } else {
            ""
        };
        bail!("cannot write {}: {error}{hint}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destdir_goes_in_front() {
        let path = Path::new("/usr/local/bin/x");
        assert_eq!(under(Path::new("/"), path), path);
        assert_eq!(under(Path::new("/tmp/d"), path), Path::new("/tmp/d/usr/local/bin/x"));
    }

    #[test]
    fn a_file_is_replaced_with_its_mode() {
        let directory = workspace::target().join(format!("test-put-{}", std::process::id()));
        let path = directory.join("a/b");
        put(&path, 0o755, b"old").expect("directories are made");
        put(&path, 0o644, b"new").expect("the file is replaced");
        assert_eq!(fs::read(&path).expect("it is there"), b"new");
        let mode = fs::metadata(&path).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        assert_eq!(fs::read_dir(directory.join("a")).expect("made").count(), 1);
        fs::remove_dir_all(&directory).expect("made above");
    }

    #[test]
    fn the_unit_names_no_placeholder_but_ours() {
        let filled = UNIT.replace("@PROGRAM@", "p").replace("@OPTIONS@", "o");
        assert!(!filled.contains('@'), "{filled}");
        assert!(filled.contains("ExecStart=p run"));
    }

    #[test]
    fn the_unit_reloads_what_it_started() {
        let options = |command: &str| UNIT.lines().find_map(|line| line.strip_prefix(command));
        assert_eq!(options("ExecReload=@PROGRAM@ reload "), Some("$TPROXY_OPTIONS"));
        assert_eq!(options("ExecStart=@PROGRAM@ run "), Some("$TPROXY_OPTIONS"));
    }
}
