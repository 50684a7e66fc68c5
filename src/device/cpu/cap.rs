//! Soft caps of logits. Knows nothing of vocabularies. Invariant: each value's result depends on that value alone.

use super::isa::per_isa;
use super::simd::{LANES, Simd};

per_isa! {
    /// x = cap · tanh(x / cap)
    pub(super) fn soft_cap(x: &mut [f32], cap: f32) = soft_cap_body;
}

#[inline(always)]
fn soft_cap_body<S: Simd>(s: S, x: &mut [f32], cap: f32) {
    for chunk in x.chunks_mut(LANES) {
        let mut values = [0.0; LANES];
        // SAFETY: 16 values.
        unsafe { s.store(values.as_mut_ptr(), s.soft_cap(s.load_part(chunk), cap)) };
        chunk.copy_from_slice(&values[..chunk.len()]);
    }
}
