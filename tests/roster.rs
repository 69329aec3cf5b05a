//! Who counts: the must-have roster scenarios of the design, by name.

mod fleet;

mod roster {
    mod dying;
    mod joining;
    mod leaving;
}

use quotum::Quota;
use quotum::ledger::RosterSettings;

const MINUTE: u64 = 60_000;
const LIMIT: u64 = 9_000;
/// A nominal window start well after the epoch.
const START: u64 = 1_000 * MINUTE;

fn quota() -> Quota {
    Quota::tokens(LIMIT).per_minute()
}

fn settings() -> RosterSettings {
    RosterSettings::default()
}
