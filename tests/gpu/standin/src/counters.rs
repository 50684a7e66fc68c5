//! What was done, counted; written to a file at the process's end.

use crate::driver::{complain, last_look};
use std::collections::BTreeMap;
use std::fmt::Write;

#[derive(Default)]
pub(crate) struct Tally {
    /// Calls by name, and other things that are counted.
    calls: BTreeMap<String, u64>,
    /// Their names in order, a line each, if somebody wants them.
    pub(crate) order: Option<String>,
    kernels: BTreeMap<String, Kernel>,
    /// Bytes that the work that runs has read and written.
    moved: (u64, u64),
    pub(crate) used: usize,
    pub(crate) most_used: usize,
}

#[derive(Default)]
struct Kernel {
    launches: u64,
    counters: ptx::Counters,
}

impl Tally {
    /// With the order of calls, or without.
    pub(crate) fn new(is_ordered: bool) -> Self {
        Self { order: is_ordered.then(String::new), ..Self::default() }
    }

    /// Counts one more; returns how many there are now.
    pub(crate) fn call(&mut self, name: &str) -> u64 {
        if let Some(order) = &mut self.order {
            *order += name;
            order.push('\n');
        }
        let n = match self.calls.get_mut(name) {
            Some(n) => n,
            None => self.calls.entry(name.to_owned()).or_default(),
        };
        *n += 1;
        *n
    }

    pub(crate) fn add(&mut self, name: &str, n: u64) {
        *self.calls.entry(name.to_owned()).or_default() += n;
    }

    pub(crate) fn launched(&mut self, name: &str, counters: &ptx::Counters) {
        let kernel = self.kernels.entry(name.to_owned()).or_default();
        kernel.launches += 1;
        let sum = &mut kernel.counters;
        for (opcode, n) in &counters.instructions {
            *sum.instructions.entry(opcode.clone()).or_default() += n;
        }
        sum.global_read_bytes += counters.global_read_bytes;
        sum.global_written_bytes += counters.global_written_bytes;
        sum.global_read_sectors += counters.global_read_sectors;
        sum.global_written_sectors += counters.global_written_sectors;
        sum.shared_phases += counters.shared_phases;
        sum.shared_conflicts += counters.shared_conflicts;
        sum.tensor_flops += counters.tensor_flops;
    }

    /// Work of another library goes on.
    pub(crate) fn moved(&mut self, read: u64, written: u64) {
        self.moved = (self.moved.0 + read, self.moved.1 + written);
    }

    /// It is done: what it moved is counted by its name.
    pub(crate) fn worked(&mut self, name: &str, operations: u64) {
        let (read, written) = std::mem::take(&mut self.moved);
        let counters = ptx::Counters {
            global_read_bytes: read,
            global_written_bytes: written,
            tensor_flops: operations,
            ..ptx::Counters::default()
        };
        self.launched(name, &counters);
    }

    /// As JSON. Names are identifiers, or words of this crate: nothing in them needs an escape.
    pub(crate) fn text(&self) -> String {
        let mut text = "{\n \"kernels\": {".to_owned();
        let mut comma = "";
        for (name, Kernel { launches, counters: c }) in &self.kernels {
            _ = write!(
                text,
                "{comma}\n  \"{name}\": {{\"launches\": {launches}, \"instructions\": {}, \"read_bytes\": {}, \
                 \"written_bytes\": {}, \"read_sectors\": {}, \"written_sectors\": {}, \"shared_phases\": {}, \
                 \"shared_conflicts\": {}, \"tensor_flops\": {}}}",
                c.total_instructions(),
                c.global_read_bytes,
                c.global_written_bytes,
                c.global_read_sectors,
                c.global_written_sectors,
                c.shared_phases,
                c.shared_conflicts,
                c.tensor_flops
            );
            comma = ",";
        }
        text += "\n },\n \"calls\": {";
        comma = "";
        for (name, n) in &self.calls {
            _ = write!(text, "{comma}\n  \"{name}\": {n}");
            comma = ",";
        }
        _ = write!(text, "\n }},\n \"memory\": {{\"used\": {}, \"most_used\": {}}}\n}}\n", self.used, self.most_used);
        text
    }
}

/// Called by the C library when the process ends by `exit`.
pub(crate) extern "C" fn write_down() {
    last_look(|driver| {
        let write = |path: &str, text: &str| {
            let path = path.replace("%p", &std::process::id().to_string());
            if let Err(error) = std::fs::write(&path, text) {
                complain(format_args!("{path}: {error}"));
            }
        };
        if let Some(path) = &driver.knobs.counters {
            write(path, &driver.tally.text());
        }
        if let Some((path, order)) = driver.knobs.order.as_ref().zip(driver.tally.order.as_ref()) {
            write(path, order);
        }
    });
}
