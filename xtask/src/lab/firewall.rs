//! The packet filter rules of a namespace, to show that there are none.

use anyhow::Result;

use super::namespace::Namespace;

/// Every rule of a namespace, whichever tool made it. Empty: there is none.
/// A tool that is not installed is not asked; nft shows iptables-nft's as well.
///
/// # Errors
/// Where a command fails.
pub fn rules(namespace: &Namespace) -> Result<String> {
    let mut rules = String::new();
    for command in ["nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save"] {
        let output = namespace.cmd("sh").args(["-c", command]).run()?;
        // sh(1): 127 is a command that was not found.
        if output.code() == 127 {
            continue;
        }
        let output = output.expect_code(0)?;
        rules.extend(
            output.stdout.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")),
        );
    }
    Ok(rules)
}
