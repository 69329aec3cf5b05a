//! From a mode as it is written to one that can be promised.
//!
//! Knows what each mode wants to be told. Must not know what a mode does. The invariant it
//! keeps: nothing is guessed: a setting that is missing, unknown or out of range is
//! refused with an example of what would be right.

use crate::{Margin, Mode, Portion};
use serde_saphyr::{Location, Spanned};

use super::Check;
use crate::config::tree::Tree;

const ELASTIC: &str = "{ elastic: { beta: 0.05 } }";
const SUM: &str = "{ sum: { margin: auto } }";

pub(super) fn mode(check: &mut Check<'_>, written: Option<Spanned<Tree>>, field: &str) -> Mode {
    let Some(written) = written else { return Mode::Strict };
    let field = format!("{field}.mode");
    let at = written.referenced;
    match written.value {
        Tree::Text(name) => named(check, &name, at, &field),
        Tree::Map(mut modes) => match (modes.pop(), modes.is_empty()) {
            (Some((name, settings)), true) => with_settings(check, &name, settings, &field),
            (None, _) => wrong(check, at, field, "names no mode; write `strict`"),
            _ => wrong(check, at, field, "names several modes; keep one"),
        },
        other => {
            let message = format!("{other} is not a mode; write strict, observe, {ELASTIC} or {SUM}");
            wrong(check, at, field, &message)
        }
    }
}

fn named(check: &mut Check<'_>, name: &str, at: Location, field: &str) -> Mode {
    match name {
        "strict" => Mode::Strict,
        "observe" => Mode::Observe,
        "elastic" => {
            let message = format!("`elastic` needs its beta, the part of the limit that may be over; write {ELASTIC}");
            wrong(check, at, field, &message)
        }
        "sum" => {
            let message = format!("`sum` needs its margin, the part of the limit to hold back; write {SUM}");
            wrong(check, at, field, &message)
        }
        other => {
            let message = format!("`{other}` is not one of: strict, observe, {ELASTIC}, {SUM}");
            wrong(check, at, field, &message)
        }
    }
}

fn with_settings(check: &mut Check<'_>, name: &str, settings: Spanned<Tree>, field: &str) -> Mode {
    let at = settings.referenced;
    match name {
        "strict" | "observe" => {
            let message = format!("`{name}` has no settings; write mode: {name}");
            wrong(check, at, field, &message)
        }
        "elastic" => {
            let field = format!("{field}.elastic");
            let beta = the_setting(check, settings, &field, "beta", ELASTIC);
            let beta = beta.and_then(|beta| self::beta(check, &beta, &format!("{field}.beta")));
            beta.map_or(Mode::Strict, |beta| Mode::Elastic { beta })
        }
        "sum" => {
            let field = format!("{field}.sum");
            let margin = the_setting(check, settings, &field, "margin", SUM);
            let margin = margin.and_then(|margin| self::margin(check, &margin, &format!("{field}.margin")));
            margin.map_or(Mode::Strict, |margin| Mode::Sum { margin })
        }
        // It is no mode, with or without settings.
        other => named(check, other, at, field),
    }
}

/// Returns the one setting that a mode has.
fn the_setting(
    check: &mut Check<'_>,
    settings: Spanned<Tree>,
    field: &str,
    name: &str,
    example: &str,
) -> Option<Spanned<Tree>> {
    let at = settings.referenced;
    let Tree::Map(settings) = settings.value else {
        check.problem(at, field, format!("{} is not its settings; write {example}", settings.value));
        return None;
    };
    let mut found = None;
    for (key, value) in settings {
        if key == name {
            found = Some(value);
        } else {
            let message = format!("is not a setting of this mode; its one setting is {name}");
            check.problem(value.referenced, format!("{field}.{key}"), message);
        }
    }
    if found.is_none() {
        check.problem(at, format!("{field}.{name}"), format!("is missing; write {example}"));
    }
    found
}

fn beta(check: &mut Check<'_>, written: &Spanned<Tree>, field: &str) -> Option<Portion> {
    let number = match &written.value {
        Tree::Number(number) => Some(*number),
        Tree::Text(text) => text.parse().ok(),
        Tree::Map(_) | Tree::List(_) | Tree::Other => None,
    };
    let portion = number.and_then(|number| Portion::new(number).ok()).filter(|portion| *portion != Portion::ZERO);
    if portion.is_none() {
        let message = format!(
            "{} is not a part of the limit: a number over 0 and under 1, such as 0.05 for a twentieth",
            written.value
        );
        check.problem(written.referenced, field, message);
    }
    portion
}

/// One form for a part, with its sign, because 10 and 0.1 are both easily meant for a tenth.
fn margin(check: &mut Check<'_>, written: &Spanned<Tree>, field: &str) -> Option<Margin> {
    let margin = match &written.value {
        Tree::Text(text) if text == "auto" => Some(Margin::Auto),
        Tree::Text(text) => {
            text.strip_suffix('%').and_then(|text| text.trim().parse::<f64>().ok()).and_then(|percent| {
                let portion = Portion::new(percent / 100.0).ok();
                portion.map(Margin::Fixed)
            })
        }
        Tree::Number(_) | Tree::Map(_) | Tree::List(_) | Tree::Other => None,
    };
    if margin.is_none() {
        let message = format!(
            "{} is not a margin: `auto`, or a percentage of the limit from 0% to under 100%, such as 10%",
            written.value
        );
        check.problem(written.referenced, field, message);
    }
    margin
}

fn wrong(check: &mut Check<'_>, at: Location, field: impl Into<String>, message: &str) -> Mode {
    check.problem(at, field, message);
    Mode::Strict
}
