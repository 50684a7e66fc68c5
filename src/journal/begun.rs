//! Rows that earlier runs began and did not end: their checkpoints, joined. Knows nothing of what these hold. Invariant: of a
//! sequence it holds an unbroken run of checkpoints from its beginning, the last ones that were journaled.

use std::collections::HashMap;

use super::segment::Checkpoint;

/// By row, and by sequence of the row: where each checkpoint begins and ends, and its data.
#[derive(Debug, Default)]
pub struct BegunRows {
    rows: HashMap<u64, HashMap<u32, Vec<Piece>>>,
}

#[derive(Debug)]
struct Piece {
    start: u64,
    end: u64,
    data: String,
}

impl BegunRows {
    /// Takes in a checkpoint, in the order they were journaled. One that begins where there was one before replaces it and
    /// what followed: a run that could not go on from there began anew.
    pub(super) fn add(&mut self, checkpoint: Checkpoint<'_>) {
        let Checkpoint { row, part, start, end, data } = checkpoint;
        let pieces = self.rows.entry(row).or_default().entry(part).or_default();
        while pieces.last().is_some_and(|last| last.start >= start) {
            pieces.pop();
        }
        if pieces.last().map_or(0, |last| last.end) == start {
            pieces.push(Piece { start, end, data: data.into_owned() });
        } else {
            pieces.clear();
        }
    }

    /// The row has an outcome.
    pub(super) fn end(&mut self, row: u64) {
        self.rows.remove(&row);
    }

    /// Row, sequence, and the data of its checkpoints in order, of each that has any.
    pub fn into_parts(self) -> impl Iterator<Item = (u64, u32, Vec<String>)> {
        self.rows.into_iter().flat_map(|(row, parts)| {
            let parts = parts.into_iter().filter(|(_, pieces)| !pieces.is_empty());
            parts.map(move |(part, pieces)| (row, part, pieces.into_iter().map(|piece| piece.data).collect()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_follows_counts() {
        let mut begun = BegunRows::default();
        for (row, part, start, end) in
            [(1, 0, 0, 5), (1, 1, 0, 3), (1, 0, 5, 9), (2, 0, 0, 4), (1, 1, 0, 4), (3, 0, 2, 4), (1, 1, 4, 6), (4, 0, 0, 1)]
        {
            begun.add(Checkpoint { row, part, start, end, data: format!("{start}-{end}").into() });
        }
        begun.end(2);
        begun.end(9);
        // Half of it is there again: what it was is not known any more.
        begun.add(Checkpoint { row: 4, part: 0, start: 3, end: 5, data: "3-5".into() });
        let mut found: Vec<_> = begun.into_parts().collect();
        found.sort();
        let pieces = |texts: [&str; 2]| texts.map(str::to_owned).to_vec();
        assert_eq!(found, [(1, 0, pieces(["0-5", "5-9"])), (1, 1, pieces(["0-4", "4-6"]))]);
    }
}
