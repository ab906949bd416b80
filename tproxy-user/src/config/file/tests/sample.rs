//! The sample has what there is.

use std::collections::BTreeSet;

use super::super::{parse, schema};

/// The sample that is installed.
const SAMPLE: &str = include_str!("../../../../../xtask/assets/tproxy.toml");

/// The sample with its keys in force, those that are examples too.
fn sample() -> String {
    let key = |line: &str| line.starts_with(|first: char| first == '[' || first.is_ascii_lowercase());
    let uncommented = |line: &'static str| line.strip_prefix('#').filter(|rest| key(rest)).unwrap_or(line);
    SAMPLE.lines().map(uncommented).collect::<Vec<_>>().join("\n")
}

/// Keys such as `capture.to` of a schema's object, those of objects within it as well.
fn keys_of_schema(
    root: &serde_json::Value,
    object: &serde_json::Value,
    under: &str,
    keys: &mut BTreeSet<String>,
) {
    let target = object["$ref"].as_str().or_else(|| object["items"]["$ref"].as_str());
    let object = target.map_or(object, |target| &root["$defs"][target.trim_start_matches("#/$defs/")]);
    match object["properties"].as_object() {
        Some(properties) => {
            for (name, property) in properties {
                keys_of_schema(root, property, &format!("{under}.{name}"), keys);
            }
        }
        None => drop(keys.insert(under.trim_start_matches('.').to_owned())),
    }
}

/// Keys of a table, those of tables within it and of lists of tables as well.
fn keys_of_table(table: &toml::Table, under: &str, keys: &mut BTreeSet<String>) {
    for (name, value) in table {
        let name = format!("{under}.{name}");
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut tables = values.iter().filter_map(toml::Value::as_table).peekable();
        if tables.peek().is_none() {
            keys.insert(name.trim_start_matches('.').to_owned());
        }
        tables.for_each(|table| keys_of_table(table, &name, keys));
    }
}

#[test]
fn the_sample_has_every_key_of_the_schema_and_no_other() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("networks.txt"), "10.0.0.0/8").expect("written");
    std::fs::write(directory.path().join("names.txt"), "example.org").expect("written");
    std::fs::write(directory.path().join("exit.pw"), "secret").expect("written");
    let authority = rcgen::generate_simple_self_signed(["authority".to_owned()]).expect("a certificate");
    std::fs::write(directory.path().join("ca.pem"), authority.cert.pem()).expect("written");
    // These are not in the environment of tests.
    let sample_here = sample()
        .replace("password_env = \"WEB_PASSWORD\"", "password_file = \"exit.pw\"")
        .replace("password_credential = \"other\"", "password_file = \"exit.pw\"");
    let parsed = parse(sample_here.as_bytes(), &directory.path().join("tproxy.toml"));
    let (_, resolved) = parsed.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(resolved.rules.len(), 9);

    let mut keys_of_sample = BTreeSet::new();
    let table: toml::Table = sample().parse().expect("parsed above");
    keys_of_table(&table, "", &mut keys_of_sample);
    let schema = schema().to_value();
    let mut known = BTreeSet::new();
    keys_of_schema(&schema, &schema, "", &mut known);
    assert_eq!(keys_of_sample, known);
}
