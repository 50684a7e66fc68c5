//! What becomes of a token's queries, keys and values between their product and attention: bias, norms of heads, rotation, and a place in
//! the cache. Knows nothing of threads. Invariant: a token's are made of its own values and position alone.

use super::cache::{self, CacheWriter, RopeTable};
use super::isa::Isa;
use super::{Vector, norm};
use crate::device::batch::Batch;
use crate::device::{AttentionSpec, BLOCK_TOKENS, QkvExtra};
use std::ops::Range;

/// The operation for a step's tokens.
pub(super) struct FinishQkv<'a> {
    isa: Isa,
    extra: &'a QkvExtra<Vector>,
    spec: &'a AttentionSpec,
    batch: &'a Batch,
    table: &'a RopeTable,
    cache: CacheWriter<'a>,
}

impl<'a> FinishQkv<'a> {
    /// With the tables of all layers' frequencies, one of which is this one's or will be.
    pub(super) fn new(
        (isa, tables): (Isa, &'a mut Vec<RopeTable>),
        extra: &'a QkvExtra<Vector>,
        spec: &'a AttentionSpec,
        batch: &'a Batch,
        cache: CacheWriter<'a>,
    ) -> Self {
        let n_positions = batch.positions.iter().max().map_or(0, |&position| position as usize + 1);
        Self { isa, extra, spec, batch, table: rope_table(tables, spec, n_positions), cache }
    }

    /// For some tokens, whose rows are `[tokens, width]`. Nobody else may do the same tokens.
    pub(super) fn tokens(&self, tokens: Range<usize>, (qkv, width): (&mut [f32], usize)) {
        let (batch, spec) = (self.batch, self.spec);
        let (hd, n_heads, n_kv_heads) = (spec.head_dim, spec.n_heads, spec.n_kv_heads);
        assert!((n_heads + 2 * n_kv_heads) * hd <= width, "rows of {width} are too short for q, k and v");
        for (token, row) in tokens.zip(qkv.chunks_exact_mut(width)) {
            let seq = &batch.seqs[batch.seqs.partition_point(|seq| seq.token_start as usize <= token) - 1];
            let position = batch.positions[token] as usize;
            let place = (batch.block_table(seq)[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
            self.apply(row);
            let (qk, v) = row.split_at_mut((n_heads + n_kv_heads) * hd);
            for head in qk.chunks_exact_mut(hd) {
                cache::rotate(self.isa, head, self.table.at(position), spec.rope_style);
            }
            let keys = qk[n_heads * hd..].chunks_exact(hd);
            for (kv_head, (k, v)) in keys.zip(v.chunks_exact(hd)).enumerate() {
                // SAFETY: a slot belongs to one token of the step.
                unsafe { self.cache.store(self.isa, place, kv_head, k, v) };
            }
        }
    }

    /// Adds the bias to a token's q, k and v and norms the heads of q and k.
    fn apply(&self, row: &mut [f32]) {
        let AttentionSpec { n_heads, n_kv_heads, head_dim, .. } = *self.spec;
        if let Some(Vector(bias)) = &self.extra.bias {
            assert_eq!(bias.len(), (n_heads + 2 * n_kv_heads) * head_dim);
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
        if let Some(norms) = &self.extra.norms {
            let (q, rest) = row.split_at_mut(n_heads * head_dim);
            q.chunks_exact_mut(head_dim).for_each(|head| norm::rms_norm_in_place(self.isa, head, &norms.q.0, norms.eps));
            let k = rest[..n_kv_heads * head_dim].chunks_exact_mut(head_dim);
            k.for_each(|head| norm::rms_norm_in_place(self.isa, head, &norms.k.0, norms.eps));
        }
    }
}

/// The table of a layer's frequencies, reaching positions `0..n_positions`.
pub(super) fn rope_table<'a>(tables: &'a mut Vec<RopeTable>, spec: &AttentionSpec, n_positions: usize) -> &'a RopeTable {
    let i = tables.iter().position(|table| table.is_of(spec)).unwrap_or_else(|| {
        tables.push(RopeTable::new(spec));
        tables.len() - 1
    });
    tables[i].reach(n_positions);
    &tables[i]
}
