//! Planted bugs: each must be caught by the oracle, or the simulator proves nothing.
//!
//! Knows which bug it plants and where: at the boundary of a replica, in what it hears,
//! says and is told. Must not know how it will be caught. The invariant it keeps: without
//! a canary nothing here changes anything.

use std::num::NonZeroU64;

use quotum::ledger::{WindowKind, Zone};
use quotum::{Margin, Mode, Portion, Quota};

/// The quota that replicas are given: the plan's, but for canaries.
pub(crate) fn quota(canary: Option<Canary>, quota: Quota) -> Quota {
    let with_amount = |amount: u64, kind: WindowKind| {
        let other = Quota::new(quota.unit(), amount, quota.window().duration()).and_then(|quota| quota.of_kind(kind));
        other.unwrap_or(quota)
    };
    match (canary, quota.kind()) {
        (Some(Canary::SlicesTooLarge), kind @ WindowKind::Sliding { parts }) => {
            with_amount(quota.amount() * (u64::from(parts) + 1) / u64::from(parts), kind)
        }
        (Some(Canary::RightsLiveTooLong), WindowKind::Bucket { burst }) => {
            let longer = NonZeroU64::new(burst.get() * 3 / 2).unwrap_or(burst);
            with_amount(quota.amount(), WindowKind::Bucket { burst: longer })
        }
        (Some(Canary::NotVested), WindowKind::Day { .. }) => quota.at_once(),
        (Some(Canary::WrongMidnight), WindowKind::Day { .. }) => {
            with_amount(quota.amount(), WindowKind::Day { zone: Zone::UTC })
        }
        _ => quota,
    }
}

/// The mode that replicas are given: the plan's, but for canaries.
pub(crate) fn mode(canary: Option<Canary>, mode: Mode) -> Mode {
    match (canary, mode) {
        (Some(Canary::AllowanceTwice), Mode::Elastic { beta }) => {
            Mode::Elastic { beta: Portion::new(beta.as_part() * 2.0).unwrap_or(beta) }
        }
        (Some(Canary::MarginForgotten), Mode::Sum { .. }) => Mode::Sum { margin: Margin::Fixed(Portion::ZERO) },
        _ => mode,
    }
}

/// One planted bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Canary {
    WindowLeak,
    ScalarMaximum,
    DroppedHits,
    DeadSpendLost,
    IncompleteList,
    NoFloor,
    NoAck,
    AckOfZero,
    AckOffByOne,
    GoneTooEarly,
    GoneOffByOne,
    ReclaimByTimeout,
    ShareTakenTwice,
    ReusedId,
    ShareWithoutEntitlement,
    FirstWindowAdmit,
    DoubleSettle,
    DebtForgotten,
    RequestAnsweredTwice,
    GiftWithoutDebit,
    GiftToAnother,
    GiftCountedAtEachRepeat,
    GiftUnderAnotherName,
    ChargeOffByOne,
    NoEdgeGuard,
    AnswersLost,
    SilentRefusal,
    LeaksRefund,
    SlicesTooLarge,
    RightsLiveTooLong,
    CarriedAndKept,
    InstalmentTwice,
    NotVested,
    WrongMidnight,
    AllowanceGivenAway,
    AllowanceTwice,
    MarginForgotten,
    OldLimitKept,
    ShareInTwoVersions,
    SwitchInsideAWindow,
    FragmentDropped,
    WrongKey,
    PayloadDamaged,
    NewestToAll,
    VersionNotSaid,
    NewestNotSaid,
    UsageForgotten,
    StreamNotCounted,
    SentAgain,
}

impl Canary {
    /// Every canary with its name, what is wrong, and the scenario that must catch it.
    pub(crate) const ALL: &[(Self, &str, &str, &str)] = &[
        (
            Self::WindowLeak,
            "window-leak",
            "a row of a closed window is merged into the running one (limitador)",
            "swarm",
        ),
        (Self::ScalarMaximum, "scalar-maximum", "peers' counters share one slot that is merged by maximum", "swarm"),
        (Self::DroppedHits, "dropped-hits", "a part of the hits is missing in what is published", "swarm"),
        (Self::DeadSpendLost, "dead-spend-lost", "what a dead replica spent is not passed on", "swarm"),
        (Self::IncompleteList, "incomplete-list", "a newcomer joins on a list that lacks live replicas", "swarm"),
        (Self::NoFloor, "no-floor", "a newcomer's floor is where the running window starts", "swarm"),
        (Self::NoAck, "no-ack", "a newcomer joins without anybody's answer", "swarm"),
        (Self::AckOfZero, "ack-of-zero", "an answer does not say from which window on the newcomer counts", "swarm"),
        (
            Self::AckOffByOne,
            "ack-off-by-one",
            "an answer names the last frozen window, not the first unfrozen one",
            "swarm",
        ),
        (
            Self::GoneTooEarly,
            "gone-too-early",
            "a death is dated to the epoch: joiners and holders ignore its windows",
            "swarm",
        ),
        (Self::GoneOffByOne, "gone-off-by-one", "a leaver is gone in the last window that it froze", "swarm"),
        (Self::ReclaimByTimeout, "reclaim-by-timeout", "a replica silent for 2 s is declared dead", "swarm"),
        (Self::ShareTakenTwice, "share-taken-twice", "two workers of a pod own its share, each", "swarm"),
        (Self::ReusedId, "reused-id", "a restarted process uses its old id", "swarm"),
        (
            Self::ShareWithoutEntitlement,
            "share-without-entitlement",
            "a newcomer takes its part of the running window before anybody counts it",
            "swarm",
        ),
        (Self::FirstWindowAdmit, "first-window-admit", "a restarted fleet takes the running window again", "swarm"),
        (Self::DoubleSettle, "double-settle", "a response's end is settled twice: refunded twice", "swarm"),
        (Self::DebtForgotten, "debt-forgotten", "use above the reservation is not charged", "swarm"),
        (Self::RequestAnsweredTwice, "request-answered-twice", "a replayed rights request is answered again", "swarm"),
        (
            Self::GiftWithoutDebit,
            "gift-without-debit",
            "rights are published before they are debited, and are not",
            "swarm",
        ),
        (Self::GiftToAnother, "gift-to-another", "a gift to another replica is credited here too", "swarm"),
        (
            Self::GiftCountedAtEachRepeat,
            "gift-at-each-repeat",
            "gifts are added, not merged by maximum: each repeat credits again",
            "swarm",
        ),
        (
            Self::GiftUnderAnotherName,
            "relayed-gift-twice",
            "a relayed row is taken for one of the relaying replica: its gifts count twice",
            "swarm",
        ),
        (Self::ChargeOffByOne, "charge-off-by-one", "one token less than reserved is charged", "swarm"),
        (Self::NoEdgeGuard, "no-edge-guard", "a reservation near a window's end is charged to one window only", "edge"),
        (Self::AnswersLost, "answers-lost", "a member never answers newcomers", "swarm"),
        (Self::SilentRefusal, "silent-refusal", "a request is refused although this replica covers it", "swarm"),
        (Self::LeaksRefund, "refund-lost", "a refund is not put back", "swarm"),
        (
            Self::SlicesTooLarge,
            "slices-too-large",
            "each of the parts of a sliding window lets amount / parts through: one part too many fits an interval",
            "sliding",
        ),
        (Self::RightsLiveTooLong, "expired-rights", "a bucket's rights live longer than its burst allows", "bucket"),
        (
            Self::CarriedAndKept,
            "carried-and-kept",
            "rights received in one slice of a bucket are counted in the next one, too",
            "bucket",
        ),
        (Self::InstalmentTwice, "instalment-twice", "each instalment of a day is dealt to two workers of a pod", "day"),
        (Self::NotVested, "not-vested", "a day's amount is all there at midnight, though it should vest", "day"),
        (Self::WrongMidnight, "wrong-midnight", "days begin when they begin in Greenwich", "day"),
        (
            Self::AllowanceGivenAway,
            "allowance-given-away",
            "a donor gives away its allowance too, which no right covers",
            "elastic",
        ),
        (Self::AllowanceTwice, "allowance-twice", "a share's allowance is credited twice", "elastic"),
        (Self::MarginForgotten, "margin-forgotten", "the margin of sum is not held back", "sum-alone"),
        (Self::OldLimitKept, "old-limit-kept", "one replica goes on with the old limit", "limit-change"),
        (
            Self::ShareInTwoVersions,
            "two-versions",
            "a replica takes its share in the old version and in the new one",
            "limit-change",
        ),
        (
            Self::SwitchInsideAWindow,
            "switch-inside",
            "a replica switches inside a window, with a share of the new version",
            "limit-change",
        ),
        // The same and others in whole pods, opened and sealed again between two of them.
        (
            Self::GiftCountedAtEachRepeat,
            "pods-frame-counted-twice",
            "a frame counts again each time it is repeated: its gifts are added up",
            "pods-swarm",
        ),
        (
            Self::GiftToAnother,
            "pods-gift-to-another",
            "whole pods: a gift to another is credited here too",
            "pods-swarm",
        ),
        (Self::GiftWithoutDebit, "pods-gift-without-debit", "whole pods: gifts that were never debited", "pods-swarm"),
        (Self::DoubleSettle, "pods-double-settle", "whole pods: a response's end is settled twice", "pods-swarm"),
        (
            Self::FragmentDropped,
            "pods-fragment-dropped",
            "a roster whose last fragments are missing is taken for a whole one",
            "pods-swarm",
        ),
        (Self::WrongKey, "pods-wrong-key", "one pod seals with a key that nobody else has", "pods-swarm"),
        (
            Self::PayloadDamaged,
            "pods-payload-damaged",
            "a byte of every frame of one pod is damaged before it is sealed",
            "pods-swarm",
        ),
        (
            Self::NewestToAll,
            "pods-newest-to-all",
            "pods of this release write its wire version to everybody, whatever was announced",
            "pods-upgrade",
        ),
        (
            Self::VersionNotSaid,
            "pods-version-not-said",
            "pods of this release write its wire version in frames that name the version before",
            "pods-upgrade",
        ),
        (
            Self::NewestNotSaid,
            "pods-newest-not-said",
            "pods of this release say that they read no more than the release before",
            "pods-upgrade",
        ),
        (
            Self::GiftUnderAnotherName,
            "pods-relayed-without-id",
            "whole pods: a relayed row is written as one of the frame's sender",
            "pods-upgrade",
        ),
        // Behind the pods' proxies.
        (
            Self::UsageForgotten,
            "http-usage-forgotten",
            "an answer is settled with nothing used, whatever the upstream counts",
            "pods-http",
        ),
        (
            Self::StreamNotCounted,
            "http-stream-not-counted",
            "a stream whose caller hangs up is charged its prompt alone",
            "pods-http-cut",
        ),
        (
            Self::SentAgain,
            "http-sent-again",
            "a request is sent again after its upstream was too slow",
            "pods-http-slow",
        ),
    ];

    /// Says whether it configures replicas with something that is not their quota.
    pub(crate) const fn is_configured(self) -> bool {
        matches!(self, Self::SlicesTooLarge | Self::RightsLiveTooLong | Self::NotVested | Self::WrongMidnight)
    }

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(canary, ..)| *canary == self).map_or("", |(_, name, ..)| name)
    }

    /// Returns the canary with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known, ..)| *known == name).map(|(canary, ..)| *canary)
    }
}
