//! From a kind of window as it is written to one that can be kept.
//!
//! Knows what each kind wants to be told. Must not know amounts and lengths: whether a kind
//! fits them, the quota says itself. The invariant it keeps: a setting that is missing, unknown
//! or of another kind is refused with an example of what would be right.

use std::collections::BTreeMap;

use crate::ledger::{WindowKind, Zone};
use serde_saphyr::Spanned;

use crate::config::tree::Tree;
use crate::config::zone;

/// `fixed`, `sliding`, `{ sliding: { parts: 6 } }`, `{ bucket: { burst: 5000 } }`,
/// `{ day: { time_zone: America/Los_Angeles } }`; a setting may also stand beside the kind.
pub(super) fn kind(
    written: Option<Spanned<Tree>>,
    beside: [(&str, Option<Spanned<Tree>>); 3],
) -> Result<WindowKind, String> {
    const KINDS: &str = "use fixed, sliding, { bucket: { burst: 5000 } } or day";
    let (name, inside) = match written.map(|written| written.value) {
        None => ("fixed".to_owned(), Vec::new()),
        Some(Tree::Text(name)) => (name, Vec::new()),
        Some(Tree::Map(mut kinds)) => match (kinds.pop(), kinds.is_empty()) {
            (Some((name, settings)), true) => match settings.value {
                Tree::Map(settings) => (name, settings),
                other => return Err(format!("{other} is not the settings of `{name}`; {KINDS}")),
            },
            _ => return Err(format!("names not one kind of window; {KINDS}")),
        },
        Some(other) => return Err(format!("{other} is not a kind of window; {KINDS}")),
    };
    let beside = beside.into_iter().filter_map(|(setting, value)| Some((setting.to_owned(), value?)));
    let mut settings: BTreeMap<String, Tree> =
        inside.into_iter().chain(beside).map(|(setting, value)| (setting, value.value)).collect();
    let kind = match name.as_str() {
        "fixed" => WindowKind::Fixed,
        "sliding" => match settings.remove("parts") {
            None => WindowKind::SLIDING,
            Some(parts) => {
                let wrong = format!("{parts} is not a number of parts: 1 to {}", WindowKind::MAX_PARTS);
                WindowKind::Sliding { parts: whole(&parts).and_then(|parts| parts.try_into().ok()).ok_or(wrong)? }
            }
        },
        "bucket" => {
            let burst = settings.remove("burst").ok_or("a bucket needs its size: { bucket: { burst: 5000 } }")?;
            let wrong = format!("{burst} is not a burst: a whole number of units, at least 1");
            WindowKind::Bucket { burst: whole(&burst).and_then(|burst| burst.try_into().ok()).ok_or(wrong)? }
        }
        "day" => match settings.remove("time_zone") {
            None => WindowKind::Day { zone: Zone::UTC },
            Some(Tree::Text(text)) => WindowKind::Day { zone: zone::parse(&text).map_err(|error| error.to_string())? },
            Some(other) => return Err(format!("{other} is not a time zone; write one like Europe/Berlin or '+02:00'")),
        },
        other => return Err(format!("`{other}` is not a kind of window; {KINDS}")),
    };
    match settings.keys().next() {
        Some(setting) => Err(format!("`{setting}` is not a setting of {name} windows")),
        None => Ok(kind),
    }
}

/// Returns a whole number that is exact in the form in which the file's numbers are kept.
fn whole(written: &Tree) -> Option<u64> {
    match written {
        Tree::Text(text) => text.parse().ok(),
        Tree::Number(number) if number.fract() == 0.0 && (0.0..9e15).contains(number) => Some(*number as u64),
        _ => None,
    }
}
