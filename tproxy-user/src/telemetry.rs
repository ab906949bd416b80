//! Logging, to standard error, and the access log, to standard output.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::file::value::{Level, LogForm};
use crate::config::{AccessLog, Log};

/// Environment variable with a filter that goes before `-v` and `-q`, such as
/// `tproxy_user::relay=trace` (syntax of `tracing_subscriber::EnvFilter`).
pub const VARIABLE: &str = "TPROXY_LOG";

/// The filter of a level. Libraries are heard one step later than the program;
/// `tproxy` is the eBPF object, which only speaks where `--bpf-log` asked for it.
fn filter(level: Level) -> EnvFilter {
    EnvFilter::new(match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "warn,tproxy_user=info,tproxy=debug",
        Level::Debug => "info,tproxy_user=debug,tproxy=debug",
        Level::Trace => "debug,tproxy_user=trace",
    })
}

/// The filter in force, where [`VARIABLE`] does not say it.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Logs from now on what is of this level, unless [`VARIABLE`] says otherwise.
pub fn set_level(level: Level) {
    if let Some(handle) = FILTER.get() {
        // Fails only where logging is gone.
        drop(handle.reload(filter(level)));
    }
}

/// Target of the events that are the access log's lines.
pub const ACCESS: &str = "access";

/// Lines of the access log that may wait for a slow reader of standard output;
/// more are lost rather than that the relay waits.
const ACCESS_LINES: usize = 65_536;

/// Starts logging to standard error, and the access log to standard output.
/// A second call in one process changes nothing.
///
/// The access log is written as long as the guard is kept; what waits is
/// flushed when it is dropped.
pub fn init(log: Log, access_log: AccessLog) -> Option<WorkerGuard> {
    let from_variable = EnvFilter::try_from_env(VARIABLE).ok();
    let is_fixed = from_variable.is_some();
    let (filter, handle) = reload::Layer::new(from_variable.unwrap_or_else(|| filter(log.level)));
    let not_access = filter_fn(|event| event.target() != ACCESS);
    let stderr = fmt::layer().with_writer(std::io::stderr);
    let messages = if log.form == LogForm::Json {
        stderr.json().flatten_event(true).with_filter(filter).with_filter(not_access).boxed()
    } else {
        let colours = std::io::stderr().is_terminal();
        stderr.with_ansi(colours).with_target(false).with_filter(filter).with_filter(not_access).boxed()
    };
    let (access, guard) = access_layer(access_log);
    // Fails only where a logger is there already, as in tests.
    let is_first = tracing_subscriber::registry().with(messages).with(access).try_init().is_ok();
    if is_first && !is_fixed {
        drop(FILTER.set(handle));
    }
    guard
}

type BoxedLayer<S> = Box<dyn Layer<S> + Send + Sync>;

fn access_layer<S>(access_log: AccessLog) -> (Option<BoxedLayer<S>>, Option<WorkerGuard>)
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    if access_log == AccessLog::Off {
        return (None, None);
    }
    let (writer, guard) =
        NonBlockingBuilder::default().buffered_lines_limit(ACCESS_LINES).finish(std::io::stdout());
    let layer = fmt::layer().with_writer(writer).with_ansi(false).with_target(false).with_level(false);
    let only_access = filter_fn(|event| event.target() == ACCESS);
    let layer = if access_log == AccessLog::Json {
        layer.json().flatten_event(true).with_filter(only_access).boxed()
    } else {
        layer.with_filter(only_access).boxed()
    };
    (Some(layer), Some(guard))
}
