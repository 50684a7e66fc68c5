//! Rounds to `IQ4_NL` and `IQ4_XS`, which candle-core reads and does not make: 4-bit indexes of values that lie closer near 0.
//! Knows nothing of models.

use crate::tensor::{GROUP, IQ4_VALUES};
use half::f16;

/// Bytes of the indexes of a group.
const INDEX_BYTES: usize = GROUP / 2;

/// Rows of whole groups of 32 elements as `IQ4_NL`: a scale, and the indexes.
pub(super) fn nl(values: &[f32]) -> Vec<u8> {
    let (groups, _) = values.as_chunks::<GROUP>();
    let block = |group: &[f32; GROUP]| {
        let scale = f16::from_f32(best_scale(group));
        [&scale.to_le_bytes()[..], &packed(group, scale.to_f32())].concat()
    };
    groups.iter().flat_map(block).collect()
}

/// Rows of whole blocks of 256 elements as `IQ4_XS`: a scale, of each group a factor of it from -32 to 31, and the indexes.
pub(super) fn xs(values: &[f32]) -> Vec<u8> {
    let (groups, _) = values.as_chunks::<GROUP>();
    groups.chunks_exact(8).flat_map(xs_block).collect()
}

fn xs_block(groups: &[[f32; GROUP]]) -> Vec<u8> {
    let best: Vec<f32> = groups.iter().map(best_scale).collect();
    // The largest takes the factor that reaches furthest.
    let largest = best.iter().copied().fold(0.0, |a: f32, b| if b.abs() > a.abs() { b } else { a });
    let scale = f16::from_f32(largest / -32.0);
    let inverse = if scale.to_f32() == 0.0 { 0.0 } else { 1.0 / scale.to_f32() };
    let factors: Vec<i8> = best.iter().map(|best| (best * inverse).round_ties_even().clamp(-32.0, 31.0) as i8).collect();
    let (mut high, mut low) = (0u16, [0u8; 4]);
    for (i, factor) in factors.iter().enumerate() {
        let bits = (factor + 32) as u8;
        high |= u16::from(bits >> 4) << (2 * i);
        low[i / 2] |= (bits & 15) << (4 * (i % 2));
    }
    let mut block = [&scale.to_le_bytes()[..], &high.to_le_bytes(), &low].concat();
    for (group, factor) in groups.iter().zip(factors) {
        block.extend(packed(group, scale.to_f32() * f32::from(factor)));
    }
    block
}

/// Of the scales by which the largest element comes near one of the outermost values, and that of least squares for the indexes
/// that follow, the one with the least squared error.
fn best_scale(group: &[f32; GROUP]) -> f32 {
    let largest = group.iter().copied().fold(0.0, |a: f32, b| if b.abs() > a.abs() { b } else { a });
    let mut best = (0.0, f32::INFINITY);
    for step in -10..=10 {
        for outermost in [IQ4_VALUES[0], IQ4_VALUES[15]] {
            let first = largest / (f32::from(outermost) + step as f32);
            let q = group.map(|x| f32::from(IQ4_VALUES[nearest(x, first)]));
            let (xq, qq): (f32, f32) = group.iter().zip(q).fold((0.0, 0.0), |(xq, qq), (x, q)| (xq + x * q, qq + q * q));
            let scale = xq / qq;
            let error = group.iter().map(|&x| (x - scale * f32::from(IQ4_VALUES[nearest(x, scale)])).powi(2)).sum::<f32>();
            if error < best.1 {
                best = (scale, error);
            }
        }
    }
    best.0
}

/// The index of the value nearest to x / scale.
fn nearest(x: f32, scale: f32) -> usize {
    let x = if scale == 0.0 { 0.0 } else { x / scale };
    let distance = |&index: &usize| (x - f32::from(IQ4_VALUES[index])).abs();
    (0..IQ4_VALUES.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).expect("there are 16")
}

/// The indexes of a group: of element i in the low half of byte i, of element i + 16 in the high one.
fn packed(group: &[f32; GROUP], scale: f32) -> [u8; INDEX_BYTES] {
    std::array::from_fn(|i| (nearest(group[i], scale) | nearest(group[i + INDEX_BYTES], scale) << 4) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    /// What is made is read as `tensor` reads files, which golden values of gguf-py hold.
    fn again(dtype: DType, bytes: &[u8], n: usize) -> Vec<f32> {
        let mut values = vec![0.0; n];
        dtype.dequantise(bytes, &mut values);
        values
    }

    #[test]
    fn values_that_the_types_have_stay_as_they_are() {
        // Every index in each group, under scales that an f16 and its factors have.
        let value = |i: usize| f32::from(IQ4_VALUES[i * 7 % 16]);
        let nl_values: Vec<f32> = (0..256).map(|i| value(i) * (0.25 + (i / GROUP) as f32)).collect();
        assert_eq!(again(DType::Iq4Nl, &nl(&nl_values), 256), nl_values);
        let factors = [-32.0, 31.0, 1.0, -1.0, 16.0, 0.0, -7.0, 30.0];
        let xs_values: Vec<f32> = (0..256).map(|i| value(i) * 0.125 * factors[i / GROUP]).collect();
        assert_eq!(again(DType::Iq4Xs, &xs(&xs_values), 256), xs_values);
        assert_eq!(again(DType::Iq4Xs, &xs(&[0.0; 256]), 256), [0.0; 256]);
    }

    #[test]
    fn other_values_are_near() {
        // Sums of 4 even draws: about a bell, as weights are.
        let mut state = 1u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let values: Vec<f32> = (0..4096).map(|_| draw() + draw() + draw() + draw()).collect();
        let squares = |values: &[f32]| values.iter().map(|x| x * x).sum::<f32>();
        for (dtype, bytes) in [(DType::Iq4Nl, nl(&values)), (DType::Iq4Xs, xs(&values))] {
            let errors: Vec<f32> = again(dtype, &bytes, values.len()).iter().zip(&values).map(|(a, b)| a - b).collect();
            let share = (squares(&errors) / squares(&values)).sqrt();
            // Nearest of 16 values that lie evenly between the extremes: 0.09.
            assert!((0.05..0.085).contains(&share), "{dtype}: {share}");
        }
    }
}
