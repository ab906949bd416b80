//! What is wrong in a config file, and where.

use std::ops::Range;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use crate::failure::Failure;

/// A file that is read.
#[derive(Clone, Copy)]
pub(super) struct Document<'a> {
    pub(super) path: &'a Path,
    pub(super) content: &'a [u8],
}

/// What is wrong with what a file says.
pub(super) enum Mistake {
    /// With the value of this key, such as `rule[2].to_file`.
    Key(String, String),
    /// With another file, which the message names.
    Elsewhere(Failure),
}

impl Document<'_> {
    /// The values of a file.
    pub(super) fn deserialize<T: DeserializeOwned>(self) -> Result<T, Failure> {
        let text = str::from_utf8(self.content)
            .map_err(|error| self.at(error.valid_up_to(), "", "the file is not UTF-8 text"))?;
        let deserializer = toml::Deserializer::parse(text).map_err(|error| self.toml("", &error))?;
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            let key = error.path().to_string();
            self.toml(if key == "." { "" } else { &key }, error.inner())
        })
    }

    /// The error about a value that turned out to be wrong later.
    pub(super) fn failure(self, mistake: Mistake) -> Failure {
        match mistake {
            Mistake::Key(key, message) => {
                let span = str::from_utf8(self.content).ok().and_then(|text| locate(text, &key));
                self.at(span.map_or(0, |span| span.start), &key, &message)
            }
            Mistake::Elsewhere(failure) => failure,
        }
    }

    fn toml(self, key: &str, error: &toml::de::Error) -> Failure {
        self.at(error.span().map_or(0, |span| span.start), key, &reword(error.message()))
    }

    /// One line, whatever is in the file.
    fn at(self, offset: usize, key: &str, message: &str) -> Failure {
        let before = &self.content[..offset.min(self.content.len())];
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        let line = before.split(|byte| *byte == b'\n').count();
        let column = 1 + String::from_utf8_lossy(&before[line_start..]).chars().count();
        let key = if key.is_empty() { String::new() } else { format!("{key}: ") };
        Failure::Usage(one_line(&format!("{}:{line}:{column}: {key}{message}", self.path.display())))
    }
}

/// The text with control characters escaped: what a file has must not steer a terminal.
pub(super) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

/// Where the value of a key is; of a key that is not there, where its table is.
fn locate(text: &str, key: &str) -> Option<Range<usize>> {
    let document = DeTable::parse(text).ok()?;
    let mut span = document.span();
    let root = DeValue::Table(document.into_inner());
    let mut value = &root;
    for part in key.split(['.', '[', ']']).filter(|part| !part.is_empty()) {
        let next = match value {
            DeValue::Table(table) => {
                table.iter().find(|(name, _)| name.get_ref() == part).map(|(_, value)| value)
            }
            DeValue::Array(values) => part.parse().ok().and_then(|index: usize| values.get(index)),
            _ => None,
        };
        let Some(next) = next else { break };
        span = next.span();
        value = next.get_ref();
    }
    Some(span)
}

/// What serde says, in the words of the file, with the nearest name that is known.
fn reword(message: &str) -> String {
    let (found, expected) = message.rsplit_once("`, expected ").unwrap_or((message, ""));
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    if let Some(name) = found.strip_prefix("unknown field `") {
        let hint = nearest(name, &known).map_or_else(|| format!("expected {}", known.join(", ")), ask);
        format!("unknown key; {hint}")
    } else if let Some(name) = found.strip_prefix("unknown variant `") {
        let hint = nearest(name, &known).map(|nearest| format!("; {}", ask(nearest))).unwrap_or_default();
        format!("'{name}': expected {}{hint}", known.join(", "))
    } else if let Some(name) = message.strip_prefix("missing field ") {
        format!("the key {name} is missing")
    } else if message == "wanted string or table" {
        "expected a string".to_owned()
    } else {
        // All lists but that of the rules say so themselves.
        message.replace("expected a sequence", "expected tables [[rule]]").replace("type: map", "type: table")
    }
}

pub(super) fn ask(name: &str) -> String {
    format!("did you mean `{name}`?")
}

/// The most similar of the known names, where one is similar.
pub(super) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let similar = known.iter().map(|candidate| (strsim::jaro_winkler(name, candidate), *candidate));
    let nearest = similar.filter(|(similarity, _)| *similarity > 0.7).max_by(|a, b| a.0.total_cmp(&b.0));
    nearest.map(|(_, candidate)| candidate)
}
