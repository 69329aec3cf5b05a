//! The `quotum-sim` command. See `cli.rs`.

use std::process::ExitCode;

fn main() -> ExitCode {
    quotum_sim::main(std::env::args().skip(1))
}
