//! What all entry points have in common.

use crate::codes::{Code, Done, NOT_INITIALIZED, NOT_PERMITTED, UNKNOWN};
use crate::driver::{complain, current, driver};
use crate::run;
use crate::work::Goal;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Counts the call, fails it if it is its turn to fail, and makes its result a number.
pub(crate) fn call(name: &str, body: impl FnOnce() -> Done) -> u32 {
    if run::inside().is_some() {
        complain(format_args!("{name} is called by a host function, which may call nothing"));
        return NOT_PERMITTED.0;
    }
    let result = catch_unwind(AssertUnwindSafe(|| {
        match driver(|driver| driver.count(name)) {
            Ok(()) | Err(NOT_INITIALIZED) => {}
            Err(code) => return Err(code),
        }
        body()?;
        now_and_then();
        Ok(())
    }));
    match result {
        Ok(Ok(())) => 0,
        Ok(Err(Code(code))) => code,
        Err(_) => UNKNOWN.0,
    }
}

/// With a seed, work is executed at times that nothing asks for. What fails then is told by the next call.
fn now_and_then() {
    let turn = driver(|driver| {
        let device = driver.context_device(current())?;
        let early = driver.knobs.seed != 0 && driver.captures.is_empty() && driver.below(4) == 0;
        Ok(early.then_some(device))
    });
    if let Ok(Some(device)) = turn {
        _ = run::until(Goal::Any(device));
    }
}
