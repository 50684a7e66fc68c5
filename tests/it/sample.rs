//! Drawing and scoring against the obvious version: sort everything, add up in f64.

#![expect(clippy::unwrap_used, clippy::float_cmp, reason = "tests panic on purpose, print what they measured and compare bits")]

use proptest::prelude::*;
use valar::device::batch::{Draw, HeadOut, HeadRow, LogitEdit, Shaping, Want};
use valar::device::sample::{self, Scratch};

const DRAW: Draw = Draw { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 1, choice: 0, position: 0, logprob: true };

fn head(draw: Draw) -> HeadRow {
    HeadRow::new(0, Want::Draw(draw), 0)
}

/// Draws from logits as they are.
fn draw(logits: &[f32], row: &HeadRow, scratch: &mut Scratch) -> HeadOut {
    sample::draw(&mut logits.to_vec(), row, Shaping::default(), scratch)
}

fn draw_once(logits: &[f32], params: Draw) -> HeadOut {
    draw(logits, &head(params), &mut Scratch::new(logits.len()))
}

/// All tokens, likeliest first, ties to the lower id.
fn sorted(logits: &[f32]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    ids
}

/// Probabilities of all tokens at a temperature, by id.
fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&x| (f64::from(x - max) / f64::from(temperature)).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// Probabilities after `top_k` and `top_p`, by id.
fn filtered(logits: &[f32], params: Draw) -> Vec<f64> {
    let mut kept = sorted(logits);
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    let mut p = softmax(logits, params.temperature);
    let mass: f64 = kept.iter().map(|&id| p[id]).sum();
    let mut sum = 0.0;
    let n_kept = kept.iter().position(|&id| {
        sum += p[id] / mass;
        sum >= f64::from(params.top_p)
    });
    kept.truncate(n_kept.map_or(kept.len(), |n| n + 1));
    let mass: f64 = kept.iter().map(|&id| p[id]).sum();
    for (id, p) in p.iter_mut().enumerate() {
        *p = if kept.contains(&id) { *p / mass } else { 0.0 };
    }
    p
}

/// Logits of which many are equal: quarters, over vocabularies around the sizes of groups and chunks.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let n = prop_oneof![1..20usize, 60..70usize, 1000..1050usize, 2000..4000usize];
    n.prop_flat_map(|n| proptest::collection::vec((-40i8..40).prop_map(|q| f32::from(q) / 4.0), n))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn log_probabilities_and_likeliest_agree_with_sorting(logits in logits(), n_top in 0u8..=20, pick in any::<u32>()) {
        let token = pick % logits.len() as u32;
        let row = HeadRow::new(0, Want::Score { token }, n_top);
        let out = draw(&logits, &row, &mut Scratch::new(logits.len()));
        let p = softmax(&logits, 1.0);
        prop_assert_eq!(out.token, token);
        prop_assert!((f64::from(out.logprob) - p[token as usize].ln()).abs() < 2e-6 * (1.0 + p[token as usize].ln().abs()));
        let want = sorted(&logits);
        prop_assert_eq!(usize::from(out.n_top), usize::from(n_top).min(logits.len()));
        for (&(id, logprob), &want) in out.top[..out.n_top.into()].iter().zip(&want) {
            prop_assert_eq!(id as usize, want);
            prop_assert!((f64::from(logprob) - p[want].ln()).abs() < 2e-6 * (1.0 + p[want].ln().abs()));
        }
    }

    #[test]
    fn one_candidate_is_greedy(logits in logits(), seed in any::<u64>(), temperature in 0.1f32..2.0) {
        let greedy = sorted(&logits)[0] as u32;
        let params = Draw { seed, temperature, ..DRAW };
        prop_assert_eq!(draw_once(&logits, Draw { temperature: 0.0, ..params }).token, greedy);
        prop_assert_eq!(draw_once(&logits, Draw { top_k: 1, ..params }).token, greedy);
        prop_assert_eq!(draw_once(&logits, Draw { top_p: 1e-6, ..params }).token, greedy);
        prop_assert_eq!(draw_once(&logits, Draw { top_p: 0.0, ..params }).token, greedy);
        prop_assert_eq!(draw_once(&logits, Draw { temperature: 1e-30, ..params }).logprob, draw_once(&logits, Draw { top_k: 1, ..params }).logprob);
    }

    #[test]
    fn only_kept_tokens_are_drawn(
        logits in logits(), seed in any::<u64>(), temperature in 0.2f32..2.0, top_k in 0u32..100, top_p in 0.05f32..=1.0,
    ) {
        let params = Draw { seed, temperature, top_k, top_p, ..DRAW };
        // A hair more mass than asked for, as sums are rounded.
        let allowed = filtered(&logits, Draw { top_p: top_p + 1e-5, ..params });
        for position in 0..20 {
            let token = draw_once(&logits, Draw { position, ..params }).token;
            prop_assert!(allowed[token as usize] > 0.0, "token {} of logit {}", token, logits[token as usize]);
        }
    }

    /// Shaped logits are drawn from like logits that were so from the start; what is reported is of the model's own.
    #[test]
    fn shaping_is_seen_by_the_draw_alone(
        logits in logits(), seed in any::<u64>(), temperature in prop_oneof![Just(0.0f32), 0.3f32..2.0], min_p in prop_oneof![Just(0.0f32), 0.01f32..1.0],
        edits in proptest::collection::btree_map(any::<u32>(), (0.5f32..2.0, -3.0f32..3.0), 0..20), mask_seed in any::<u64>(), masked in any::<bool>(),
    ) {
        let n = logits.len();
        let edits: std::collections::BTreeMap<u32, (f32, f32)> = edits.into_iter().map(|(t, e)| (t % n as u32, e)).collect();
        let edits: Vec<LogitEdit> = edits.into_iter().map(|(token, (penalty, bias))| LogitEdit { token, penalty, bias }).collect();
        let mut mask: Vec<u32> = (0..n.div_ceil(32) as u64).map(|i| (mask_seed.wrapping_mul(i * 2 + 3) >> 20) as u32).collect();
        mask[0] |= 1;
        let shaping = Shaping { edits: &edits, mask: masked.then_some(&mask[..]) };
        let mut shaped = logits.clone();
        for edit in &edits {
            let x = shaped[edit.token as usize];
            shaped[edit.token as usize] = if x > 0.0 { x / edit.penalty } else { x * edit.penalty } + edit.bias;
        }
        for (i, x) in shaped.iter_mut().enumerate() {
            if masked && mask[i / 32] >> (i % 32) & 1 == 0 {
                *x = f32::NEG_INFINITY;
            }
        }
        let row = HeadRow { n_top: 5, ..head(Draw { seed, temperature, min_p, ..DRAW }) };
        let mut scratch = Scratch::new(n);
        let got = sample::draw(&mut logits.clone(), &row, shaping, &mut scratch);
        prop_assert_eq!(got.token, draw(&shaped, &row, &mut scratch).token);
        prop_assert!(!masked || mask[got.token as usize / 32] >> (got.token % 32) & 1 == 1);
        let own = draw(&logits, &HeadRow::new(0, Want::Score { token: got.token }, 5), &mut scratch);
        prop_assert_eq!(got.logprob.to_bits(), own.logprob.to_bits());
        prop_assert_eq!(&got.top[..5.min(n)], &own.top[..5.min(n)]);
        if temperature > 0.0 && min_p > 0.0 {
            let p = softmax(&shaped, temperature);
            let largest = p.iter().copied().fold(0.0, f64::max);
            prop_assert!(p[got.token as usize] >= largest * f64::from(min_p) * (1.0 - 1e-5));
        }
    }

    #[test]
    fn what_was_drawn_before_changes_nothing(a in logits(), b in logits(), seed in any::<u64>(), top_p in 0.5f32..=1.0) {
        let row = HeadRow { n_top: 3, ..head(Draw { seed, top_p, ..DRAW }) };
        let mut used = Scratch::new(4000);
        draw(&b, &HeadRow { n_top: 20, ..head(Draw { top_k: 30, ..DRAW }) }, &mut used);
        let again = draw(&a, &row, &mut used);
        let fresh = draw(&a, &row, &mut Scratch::new(a.len()));
        prop_assert_eq!((again.token, again.logprob.to_bits()), (fresh.token, fresh.logprob.to_bits()));
        prop_assert_eq!(&again.top[..again.n_top.into()], &fresh.top[..fresh.n_top.into()]);
    }
}

/// Draws with many keys and compares the counts with the probabilities: Pearson's chi-square, whose 99.9 % quantile is
/// about df + 3.1 sqrt(2 df) + 5. The keys are fixed, so the result is too.
fn assert_distribution(logits: &[f32], params: Draw, key: impl Fn(u32) -> Draw) {
    const N_DRAWS: u32 = 4_000;
    let p = filtered(logits, params);
    let mut counts = vec![0u32; logits.len()];
    let mut scratch = Scratch::new(logits.len());
    for i in 0..N_DRAWS {
        counts[draw(logits, &head(key(i)), &mut scratch).token as usize] += 1;
    }
    // Tokens expected fewer than 10 times go into one bin.
    let (mut chi2, mut df, mut rare) = (0.0, 0.0, (0.0, 0.0));
    for (&p, &count) in p.iter().zip(&counts) {
        let (expected, count) = (p * f64::from(N_DRAWS), f64::from(count));
        assert!(p > 0.0 || count == 0.0, "a token of probability 0 was drawn");
        if expected < 10.0 {
            rare = (rare.0 + expected, rare.1 + count);
        } else {
            chi2 += (count - expected).powi(2) / expected;
            df += 1.0;
        }
    }
    if rare.0 > 10.0 {
        chi2 += (rare.1 - rare.0).powi(2) / rare.0;
        df += 1.0;
    }
    let bound = df + 3.1 * f64::sqrt(2.0 * df) + 5.0;
    assert!(df > 3.0 && chi2 < bound, "chi-square {chi2:.1} with {df} bins, bound {bound:.1}: {params:?}");
}

#[test]
fn draws_follow_the_distribution() {
    // Some likely tokens in several chunks over a flat floor.
    let logits: Vec<f32> =
        (0..2200).map(|i| if i % 130 == 3 { 4.0 + (i % 7) as f32 / 3.0 } else { -3.0 + (i % 5) as f32 / 5.0 }).collect();
    for (temperature, top_k, top_p) in
        [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.7, 0, 1.0), (1.0, 12, 1.0), (1.0, 0, 0.7), (1.0, 0, 0.97), (1.3, 15, 0.9)]
    {
        let params = Draw { temperature, top_k, top_p, ..DRAW };
        assert_distribution(&logits, params, |i| Draw { position: i, ..params });
    }
    assert_distribution(&logits, DRAW, |i| Draw { choice: i, ..DRAW });
    assert_distribution(&logits, DRAW, |i| Draw { seed: i.into(), ..DRAW });
    assert_distribution(&logits, DRAW, |i| Draw { seed: u64::from(i) << 32, ..DRAW });
}

#[test]
fn unusable_logits_are_reported() {
    let mut logits = vec![0.5f32; 1500];
    for (idx, value) in [(0, f32::NAN), (1499, f32::NAN), (700, f32::INFINITY)] {
        let before = std::mem::replace(&mut logits[idx], value);
        for want in [Want::Draw(DRAW), Want::Draw(Draw { temperature: 0.0, logprob: false, ..DRAW }), Want::Score { token: 5 }] {
            let out = draw(&logits, &HeadRow::new(0, want, 2), &mut Scratch::new(1500));
            assert!(out.is_broken(), "{value} at {idx}");
        }
        logits[idx] = before;
    }
    assert!(draw_once(&[f32::NEG_INFINITY; 70], DRAW).is_broken());
    assert!(!draw_once(&logits, DRAW).is_broken());
}

#[test]
fn impossible_tokens_are_never_drawn() {
    let logits: Vec<f32> = (0..2100).map(|i| if i % 700 == 699 { 0.0 } else { f32::NEG_INFINITY }).collect();
    for (top_k, top_p) in [(0, 1.0), (0, 0.99), (50, 1.0), (50, 0.99), (0, 1.0 - f32::EPSILON)] {
        for position in 0..500 {
            let token = draw_once(&logits, Draw { top_k, top_p, position, ..DRAW }).token;
            assert_eq!(token % 700, 699, "top_k {top_k} top_p {top_p} position {position}");
        }
    }
    let row = HeadRow::new(0, Want::Score { token: 0 }, 4);
    let out = draw(&logits, &row, &mut Scratch::new(logits.len()));
    assert_eq!((out.logprob, out.top[3]), (f32::NEG_INFINITY, (0, f32::NEG_INFINITY)));
}
