//! Feed-forward layers of experts: who uses which, and one expert after the other for the tokens that use it. Knows
//! nothing of how matrices are multiplied. Invariant: a token's experts and their weights depend on its own values alone;
//! what they give is added in the order of the experts' numbers, and no token is left out.

use super::buffer::{Aligned, Shared};
use super::gemm::{self, Epilogue, Out, Product};
use super::isa::Isa;
use super::numerics::Numerics;
use super::quant::Act;
use super::team::Team;
use super::weights::Weight;
use crate::device::{Activation, ExpertSizes, Experts, math};

/// One use of an expert by a token.
#[derive(Debug, Clone, Copy, Default)]
struct Use {
    expert: u32,
    token: u32,
    weight: f32,
}

/// What the operation needs; made once.
pub(super) struct ExpertMemory {
    sizes: ExpertSizes,
    /// `[max_tokens, n_experts]`
    scores: Aligned<f32>,
    /// `[max_tokens, n_used]`
    uses: Vec<Use>,
    /// The activations of the tokens that use an expert, `[max_tokens, width]`.
    act: Act,
    /// `[max_tokens, ffn_width]`
    gated: Act,
    /// `[max_tokens, width]`
    out: Aligned<f32>,
}

impl ExpertMemory {
    pub(super) fn new(numerics: Numerics, sizes: ExpertSizes, width: usize, max_tokens: usize) -> Self {
        Self {
            sizes,
            scores: Aligned::zeroed(max_tokens * sizes.n_experts),
            uses: vec![Use::default(); max_tokens * sizes.n_used],
            act: Act::new(numerics, max_tokens, width),
            gated: Act::new(numerics, max_tokens, sizes.ffn_width),
            out: Aligned::zeroed(max_tokens * width),
        }
    }

    /// Whether it serves such a layer and that many tokens.
    pub(super) fn is_for(&self, sizes: ExpertSizes, n_tokens: usize) -> bool {
        self.sizes == sizes && self.uses.len() >= n_tokens * sizes.n_used
    }
}

/// x[t] += what the experts make of act[t], for `n_tokens` tokens.
pub(super) fn add(
    (team, isa): (&Team, Isa),
    memory: &mut ExpertMemory,
    (act, n_tokens): (&Act, usize),
    experts: &Experts<Weight>,
    f: Activation,
    x: &mut [f32],
) {
    let n_uses = route((team, isa), memory, (act, n_tokens), experts);
    let ExpertMemory { uses, act: gathered, gated, out, .. } = memory;
    let width = act.k;
    let x = Shared::new(x);
    for users in uses[..n_uses].chunk_by(|a, b| a.expert == b.expert) {
        let expert = &experts.experts[users[0].expert as usize];
        let n_rows = users.len();
        gathered.gather(team, act, n_rows, &|row| users[row].token as usize);
        let (weight, epilogue) = (&expert.gate_up, Epilogue::Gate(f));
        let made = Out::Act(gated.writer(isa, &expert.down));
        gemm::multiply(team, &Product { isa, act: gathered, weight, n_rows, epilogue, out: made });
        let (weight, epilogue) = (&expert.down, Epilogue::Store);
        let made = Out::Values(Shared::new(out), width);
        gemm::multiply(team, &Product { isa, act: gated, weight, n_rows, epilogue, out: made });
        team.run_rows(n_rows, &|_, rows| {
            for row in rows {
                let Use { token, weight, .. } = users[row];
                // SAFETY: a token uses an expert once, and each row is in one range.
                let x = unsafe { x.part(token as usize * width, width) };
                x.iter_mut().zip(&out[row * width..]).for_each(|(x, y)| *x += weight * y);
            }
        });
    }
}

/// Fills `memory.uses` with every token's experts, sorted by expert, then token; gives their number.
fn route((team, isa): (&Team, Isa), memory: &mut ExpertMemory, (act, n_rows): (&Act, usize), experts: &Experts<Weight>) -> usize {
    let ExpertSizes { n_experts, n_used, .. } = memory.sizes;
    let out = Out::Values(Shared::new(&mut memory.scores), n_experts);
    gemm::multiply(team, &Product { isa, act, weight: &experts.router, n_rows, epilogue: Epilogue::Store, out });
    let uses = &mut memory.uses[..n_rows * n_used];
    let (scores, shared) = (Shared::new(&mut memory.scores), Shared::new(uses));
    team.run_rows(n_rows, &|_, tokens| {
        for token in tokens {
            // SAFETY: each token is in one range.
            let (scores, uses) = unsafe { (scores.part(token * n_experts, n_experts), shared.part(token * n_used, n_used)) };
            choose(scores, experts.renormalise, token as u32, uses);
        }
    });
    uses.sort_unstable_by_key(|u| (u.expert, u.token));
    n_rows * n_used
}

/// A token's experts: those with the largest scores, ties to the lower number, with softmax(scores) as weights. A NaN
/// score makes every weight NaN, and with them the token's values.
fn choose(scores: &mut [f32], renormalise: bool, token: u32, uses: &mut [Use]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    let mut total = 0.0;
    for score in scores.iter_mut() {
        *score = math::exp(*score - largest);
        total += *score;
    }
    let mut used_total = 0.0;
    for i in 0..uses.len() {
        let (chosen, rest) = uses.split_at_mut(i);
        let free = (0..scores.len()).filter(|&e| chosen.iter().all(|u| u.expert as usize != e));
        let best = free.reduce(|best, e| if scores[e] > scores[best] { e } else { best });
        let expert = best.expect("no token uses more experts than there are");
        rest[0] = Use { expert: expert as u32, token, weight: scores[expert] / total };
        used_total += rest[0].weight;
    }
    if renormalise {
        for used in uses {
            used.weight /= used_total;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(scores: &[f32], n_used: usize, renormalise: bool) -> Vec<(u32, f32)> {
        let mut uses = vec![Use::default(); n_used];
        choose(&mut scores.to_vec(), renormalise, 7, &mut uses);
        assert!(uses.iter().all(|u| u.token == 7));
        uses.iter().map(|u| (u.expert, u.weight)).collect()
    }

    #[test]
    fn the_largest_are_used_and_ties_go_to_the_lower_number() {
        let scores = [1.0, 3.0, 2.0, 3.0];
        let experts = |uses: Vec<(u32, f32)>| uses.into_iter().map(|(expert, _)| expert).collect::<Vec<_>>();
        assert_eq!(experts(chosen(&scores, 1, true)), [1]);
        assert_eq!(experts(chosen(&scores, 3, true)), [1, 3, 2]);
        assert_eq!(experts(chosen(&[0.0; 5], 2, false)), [0, 1]);
    }

    #[test]
    fn weights_are_the_softmax_divided_by_their_sum_if_so_wished() {
        let e = std::f32::consts::E;
        let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
        let plain = chosen(&[0.0, 1.0, -9.0], 2, false);
        let total = 1.0 + e + (-9f32).exp();
        assert!(near(plain[0].1, e / total) && near(plain[1].1, 1.0 / total), "{plain:?}");
        let summed = chosen(&[0.0, 1.0, -9.0], 2, true);
        assert!(near(summed[0].1, e / (1.0 + e)) && near(summed[1].1, 1.0 / (1.0 + e)), "{summed:?}");
    }

    #[test]
    fn a_nan_is_not_lost() {
        for renormalise in [false, true] {
            let uses = chosen(&[0.0, f32::NAN, 1.0], 2, renormalise);
            assert!(uses.iter().all(|u| u.1.is_nan()), "{uses:?}");
            assert_ne!(uses[0].0, uses[1].0);
        }
    }
}
