//! Scheduling classes. A completion window (configuration, later) names one; the scheduler knows only the class.

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

impl Class {
    /// All classes, most urgent first.
    pub const ALL: [Self; 3] = [Self::Asap, Self::Standard, Self::Batch];
}
