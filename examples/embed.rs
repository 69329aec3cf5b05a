//! The limiter inside your own service: two quotas, a permit for each request.
//!
//! `cargo run --example embed --no-default-features`

use quotum::{Claim, Denied, Limiter, Quota};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let limiter = Limiter::builder()
        .deployment("gpt-4o-eastus", [Quota::tokens(5_000).per_minute(), Quota::requests(600).per_minute()])
        .build()?;
    let handle = limiter.handle("gpt-4o-eastus")?;

    for request in 1..=8 {
        // Reserve the estimate: prompt and the most the answer may have.
        match handle.try_acquire(Claim::tokens(1_200)) {
            Ok(mut permit) => {
                permit.start(); // From here the tokens may be gone.
                let used = 700; // Call the upstream here, and read its usage.
                permit.settle(used);
                println!("request {request}: used {used}");
            }
            Err(denied @ Denied::TooLarge { .. }) => println!("request {request}: never: {denied}"),
            Err(denied) => println!("request {request}: later: {denied}"),
        }
    }
    for standing in handle.standings() {
        println!("{}: {} used, {} spendable", standing.quota, standing.used, standing.spendable);
    }
    Ok(())
}
