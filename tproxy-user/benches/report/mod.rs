//! Results for other programs.

use serde_json::Value;

/// Writes them to the file that `TPROXY_BENCH_JSON` names, if it names one.
pub(crate) fn write(results: &[Value]) {
    if let Some(path) = std::env::var_os("TPROXY_BENCH_JSON") {
        let text = serde_json::to_string_pretty(results).expect("JSON");
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
