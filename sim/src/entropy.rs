//! Entropy from a seed: what the operating system would answer, where a run must be
//! repeatable.
//!
//! Knows one number for each thread. Must not know who asks: hash maps, `rand`, ids and
//! nonces all ask here, by the symbol of the C library. The invariant it keeps: a thread
//! that was not seeded gets real entropy; one that was seeded gets the stream of its seed
//! and nothing else. Whoever seeds takes a new thread for it, as hash maps and `rand` keep
//! for each thread what they once asked for.

#![allow(unsafe_code)] // The one exception of the workspace: a symbol of the C library is defined here.

use std::cell::Cell;
use std::slice;

use crate::rng::mix;

/// From here on this thread's entropy is a function of the seed.
pub(crate) fn seed(seed: u64) {
    STATE.set(Some(mix(seed ^ 0x656e_7472_6f70_7921)));
}

thread_local! {
    static STATE: Cell<Option<u64>> = const { Cell::new(None) };
}

/// getrandom(2), in place of the C library's: everything that is linked statically and asks
/// for entropy comes here.
///
/// # Safety
/// As the C library's: `buffer` points to `length` writable bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    if length == 0 {
        return 0;
    }
    // SAFETY: the caller owns these bytes; zeroed first, as they may not be initialised.
    let bytes = unsafe {
        buffer.write_bytes(0, length);
        slice::from_raw_parts_mut(buffer, length)
    };
    // A thread that is ending has no state any more, and is no run.
    match STATE.try_with(Cell::get).ok().flatten() {
        Some(mut state) => {
            for chunk in bytes.chunks_mut(8) {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                chunk.copy_from_slice(&mix(state).to_le_bytes()[..chunk.len()]);
            }
            STATE.set(Some(state));
            length as isize
        }
        // Short only if a signal came in between: callers ask again for the rest.
        None => match rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::empty()) {
            Ok(filled) => filled as isize,
            Err(_) => -1,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::hash_map::RandomState;
    use std::hash::BuildHasher;
    use std::thread;

    /// What a hash map and the product's own source of randomness get in a new thread.
    fn drawn(seed: Option<u64>) -> (u64, [u8; 24]) {
        let draw = move || {
            seed.into_iter().for_each(super::seed);
            let mut bytes = [0; 24];
            getrandom::fill(&mut bytes).expect("there is entropy");
            (RandomState::new().hash_one(7), bytes)
        };
        thread::spawn(draw).join().expect("nothing panics")
    }

    #[test]
    fn a_seeded_thread_draws_the_stream_of_its_seed() {
        assert_eq!(drawn(Some(1)), drawn(Some(1)));
        let (one, other) = (drawn(Some(1)), drawn(Some(2)));
        assert!(one.0 != other.0 && one.1 != other.1);
    }

    #[test]
    fn a_thread_that_was_not_seeded_draws_real_entropy() {
        let (one, other) = (drawn(None), drawn(None));
        assert!(one.0 != other.0 && one.1 != other.1);
    }
}
