//! Scheduling classes. A completion window names one; the scheduler knows only the class, when a row is due, and whose it is.

pub mod turns;

/// How soon a sequence wants the machine; the order is the priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Now: joins the next step.
    Asap,
    /// Minutes.
    Standard,
    /// Jobs: as fast as the machine goes, when nobody else wants it.
    Batch,
}

/// Mean time that a call of class standard should take, where nobody says otherwise: seconds.
pub const STANDARD_TARGET_S: u64 = 300;
/// Part of its class's target that is aimed at for a call, so that the mean holds when some take longer.
pub const AIM: f64 = 0.6;

impl Class {
    /// All classes, most urgent first.
    pub const ALL: [Self; 3] = [Self::Asap, Self::Standard, Self::Batch];
}
