//! What is done to fleets.
//!
//! Knows cuts, signals and the order of replacements. Must not know how anything is counted.
//! The invariant it keeps: a case is graceful only if every pod that ends was told to and
//! ended by itself.

use std::future::Future;
use std::pin::Pin;

use quotum_bench::{Failure, Signal};

use super::fleet::{Fleet, Kind, Seeds};

/// A case: a fleet and what is done to it while it is loaded.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) expects: Expects,
    /// Whether the short form has it.
    pub(crate) quick: bool,
    /// Runs from a window's start.
    pub(crate) run: for<'a> fn(&'a mut Fleet) -> Doing<'a>,
    pub(crate) does: &'static str,
}

pub(crate) type Doing<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + 'a>>;

/// What must be so, beside that nothing is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expects {
    /// Nothing failed, and 98 % of every window was used.
    Grace,
    /// Nothing more.
    Nothing,
    /// That much is over: the judge is not blind.
    Over,
}

const LISTED: Kind = Kind { pods: 3, slots: 3, seeds: Seeds::List, first_window_waits: false, loss: 0 };

pub(crate) const CASES: [Case; 12] = [
    Case {
        name: "strangers",
        kind: Kind { seeds: Seeds::Nowhere, ..LISTED },
        expects: Expects::Over,
        quick: true,
        run: |fleet| Box::pin(windows(fleet, 1.0)),
        does: "three pods that do not know of one another: what the judge must see",
    },
    Case {
        name: "halves",
        kind: Kind { pods: 4, slots: 4, ..LISTED },
        expects: Expects::Nothing,
        quick: true,
        run: |fleet| Box::pin(halves(fleet)),
        does: "cut between two and two for two windows, healed for one",
    },
    Case {
        name: "one-way",
        kind: LISTED,
        expects: Expects::Nothing,
        quick: true,
        run: |fleet| Box::pin(one_way(fleet)),
        does: "the first pod is heard by nobody for two windows and hears all; healed for one",
    },
    Case {
        name: "lossy",
        kind: Kind { loss: 30, ..LISTED },
        expects: Expects::Nothing,
        quick: true,
        run: |fleet| Box::pin(windows(fleet, 2.0)),
        does: "30 % of all datagrams are lost, for two windows",
    },
    Case {
        name: "paused",
        kind: LISTED,
        expects: Expects::Nothing,
        quick: true,
        run: |fleet| Box::pin(paused(fleet)),
        does: "SIGSTOP while it spends, for a window and a half; requests lie before it when it goes on",
    },
    Case {
        name: "killed",
        kind: LISTED,
        expects: Expects::Nothing,
        quick: true,
        run: |fleet| Box::pin(killed(fleet)),
        does: "kill -9 while it streams; another process takes the slot at once",
    },
    Case {
        name: "rolling",
        kind: LISTED,
        expects: Expects::Grace,
        quick: true,
        run: |fleet| Box::pin(rolling(fleet)),
        does: "all pods replaced, each in its slot: told to stop, ended, started again, with a share before the next one",
    },
    Case {
        name: "surging",
        kind: Kind { slots: 6, seeds: Seeds::Name, ..LISTED },
        expects: Expects::Grace,
        quick: false,
        run: |fleet| Box::pin(surging(fleet)),
        does: "all pods replaced, the new one at a new address and ready before the old one is told to stop",
    },
    Case {
        name: "scaled",
        kind: Kind { pods: 1, slots: 5, seeds: Seeds::Name, ..LISTED },
        expects: Expects::Grace,
        quick: true,
        run: |fleet| Box::pin(scaled(fleet)),
        does: "one pod becomes five at once, and one again",
    },
    Case {
        name: "restarted",
        kind: Kind { first_window_waits: true, ..LISTED },
        expects: Expects::Nothing,
        quick: true,
        run: |fleet| Box::pin(restarted(fleet, true)),
        does: "kill -9 of the whole fleet in mid-window, all started again: `first_window: wait`",
    },
    Case {
        name: "redeployed",
        kind: Kind { first_window_waits: true, ..LISTED },
        expects: Expects::Nothing,
        quick: false,
        run: |fleet| Box::pin(restarted(fleet, false)),
        does: "the whole fleet told to stop at once, and started again: `first_window: wait`",
    },
    Case {
        name: "told-twice",
        kind: Kind { pods: 2, slots: 2, ..LISTED },
        expects: Expects::Nothing,
        quick: true,
        run: |fleet| Box::pin(told_twice(fleet)),
        does: "SIGTERM while a stream runs, and again: it ends at once, with 143",
    },
];

async fn windows(fleet: &Fleet, count: f64) -> Result<(), Failure> {
    fleet.part(count).await;
    Ok(())
}

async fn halves(fleet: &mut Fleet) -> Result<(), Failure> {
    fleet.part(0.2).await;
    for (one, other) in [(0, 2), (0, 3), (1, 2), (1, 3)] {
        fleet.wires.cut(one, other)?;
        fleet.wires.cut(other, one)?;
    }
    fleet.part(2.0).await;
    fleet.wires.heal()?;
    fleet.part(1.0).await;
    Ok(())
}

async fn one_way(fleet: &mut Fleet) -> Result<(), Failure> {
    fleet.part(0.2).await;
    fleet.wires.cut(0, 1)?;
    fleet.wires.cut(0, 2)?;
    fleet.part(2.0).await;
    fleet.wires.heal()?;
    fleet.part(1.0).await;
    Ok(())
}

async fn paused(fleet: &mut Fleet) -> Result<(), Failure> {
    fleet.part(0.15).await;
    let pod = &fleet.pods[0];
    pod.signal(Signal::STOP)?;
    // Only what was under way may lie there for so long: it could be of either window.
    pod.withdraw();
    fleet.part(1.5).await;
    pod.surprise(100);
    fleet.part(0.02).await;
    pod.signal(Signal::CONT)?;
    pod.restore()?;
    fleet.part(1.0).await;
    Ok(())
}

async fn killed(fleet: &mut Fleet) -> Result<(), Failure> {
    fleet.part(0.15).await;
    // The busiest, with an answer that would last.
    let stream = fleet.pods[0].begin(60_000).await?;
    fleet.pods[0].signal(Signal::KILL)?;
    let dead = fleet.pods.remove(0);
    let slot = dead.slot;
    dead.end().await?;
    drop(stream);
    fleet.run(slot).await?;
    fleet.until_ready(&fleet.pods[2]).await?;
    fleet.part(2.0).await;
    Ok(())
}

async fn rolling(fleet: &mut Fleet) -> Result<(), Failure> {
    for _ in 0..fleet.pods.len() {
        let slot = fleet.pods[0].slot;
        fleet.terminate(0).await?;
        fleet.run(slot).await?;
        fleet.until_ready(&fleet.pods[fleet.pods.len() - 1]).await?;
        // As `minReadySeconds` does: a newcomer's first window starts up to 6 s later, and if all
        // are newcomers at once, nobody has the window in between.
        fleet.until_all_share().await?;
    }
    fleet.part(1.0).await;
    Ok(())
}

async fn surging(fleet: &mut Fleet) -> Result<(), Failure> {
    let pods = fleet.pods.len();
    for number in 0..pods {
        fleet.list(pods + number)?;
        fleet.run(pods + number).await?;
        fleet.until_ready(&fleet.pods[pods]).await?;
        fleet.terminate(0).await?;
    }
    fleet.part(1.0).await;
    Ok(())
}

async fn scaled(fleet: &mut Fleet) -> Result<(), Failure> {
    for slot in 1..5 {
        fleet.list(slot)?;
    }
    for slot in 1..5 {
        fleet.run(slot).await?;
    }
    fleet.until_all_share().await?;
    fleet.part(1.0).await;
    for _ in 0..4 {
        fleet.terminate(1).await?;
    }
    fleet.part(1.0).await;
    Ok(())
}

async fn restarted(fleet: &mut Fleet, killed: bool) -> Result<(), Failure> {
    fleet.part(0.3).await;
    let slots: Vec<usize> = fleet.pods.iter().map(|pod| pod.slot).collect();
    for pod in &fleet.pods {
        pod.signal(if killed { Signal::KILL } else { Signal::TERM })?;
    }
    for pod in std::mem::take(&mut fleet.pods) {
        match (pod.end().await?, killed) {
            (None, true) | (Some(0), false) => {}
            (code, _) => return Err(format!("a pod ended with {code:?}").into()),
        }
    }
    for slot in slots {
        fleet.run(slot).await?;
    }
    fleet.until_all_share().await?;
    fleet.part(1.0).await;
    Ok(())
}

async fn told_twice(fleet: &mut Fleet) -> Result<(), Failure> {
    // The load may have spent the window: then the first stream of the next one.
    let pod = &fleet.pods[0];
    let mut stream = super::fleet::until("a stream is admitted", async || {
        let begun = pod.begin(60_000).await?;
        Ok((begun.answer.status() == 200).then_some(begun))
    })
    .await?;
    let pod = fleet.pods.remove(0);
    pod.signal(Signal::TERM)?;
    // It must have heard of it before it is told again: two at once are one to the system.
    super::fleet::until(
        "it says that it is going",
        async || Ok((pod.status().await?["leaving"] == true).then_some(())),
    )
    .await?;
    pod.signal(Signal::TERM)?;
    let code = pod.end().await?;
    if code != Some(143) {
        return Err(format!("told twice, it ended with {code:?} and not with 143").into());
    }
    // The answer would have lasted longer than anybody waits: it was cut off.
    use http_body_util::BodyExt;
    loop {
        match tokio::time::timeout(super::fleet::PATIENCE, stream.answer.body_mut().frame()).await {
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(_))) => return Ok(()),
            Ok(None) => return Err("the answer ended as if it were whole".into()),
            Err(_) => return Err("the answer goes on".into()),
        }
    }
}
