//! What a result is found by: a hash of everything that it depends on (the model's fingerprint, the prompt's token ids, every
//! parameter, seed and choice) and of the versions of the code that is not in the fingerprint.

use crate::engine::sampling::SeqParams;
use crate::engine::{RESULT_VERSION, Submission};

/// The form of keys.
const FORM: u32 = 1;

/// What a result is found by: 128 bits of BLAKE3.
pub type Key = [u8; 16];

/// What stands in all keys of a model with this fingerprint, 16 hexadecimal digits: results of another kind can't be found.
pub fn kind(fingerprint: &str) -> String {
    let hash = blake3::hash(format!("{} {fingerprint}", versions()).as_bytes());
    hash.to_hex()[..16].to_owned()
}

/// Of the code that is in no fingerprint.
fn versions() -> String {
    format!("valar result {FORM} {RESULT_VERSION} {}", env!("CARGO_PKG_VERSION"))
}

/// What a sequence's result is found by, on a model with this fingerprint; `None` if it is not known what it depends on.
pub fn key(fingerprint: &str, submission: &Submission) -> Option<Key> {
    // All fields by name: whoever adds one must say here what becomes of it.
    let Submission { id: _, prompt, params, class: _, keep_tokens: _, stream: _, due: _ } = submission;
    let SeqParams {
        max_tokens,
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias,
        min_tokens,
        stop_tokens,
        score_from,
        grammar,
        seed,
        choice,
        stop,
        ignore_eos,
        repetition,
        logprobs,
        watch: _,
        checkpoint: _,
        begun: _,
        keep: _,
        share: _,
    } = params;
    let grammar = match grammar {
        None => [0; 32],
        Some(grammar) => grammar.identity()?,
    };
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        // Lengths too: no two lists of fields make the same bytes.
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    add(versions().as_bytes());
    add(fingerprint.as_bytes());
    let floats = [*temperature, *top_p, *min_p, *presence_penalty, *frequency_penalty, *repetition_penalty];
    for float in floats {
        add(&float.to_bits().to_le_bytes());
    }
    // Greedy tokens know no seed.
    let drawn = if *temperature > 0.0 { (*seed, *choice) } else { (0, 0) };
    add(format!("{max_tokens} {top_k} {min_tokens} {score_from:?} {drawn:?} {ignore_eos} {logprobs:?}").as_bytes());
    add(format!("{stop_tokens:?} {stop:?} {repetition:?} {}", logit_bias.len()).as_bytes());
    for (token, bias) in logit_bias {
        add(format!("{token} {}", bias.to_bits()).as_bytes());
    }
    add(&grammar);
    add(&prompt.iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>());
    let hash = hasher.finalize();
    let (key, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    Some(*key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Repetition;
    use std::sync::Arc;

    #[test]
    fn every_field_makes_another_key() {
        let base = || Submission {
            id: 1,
            prompt: Arc::new([1, 2, 3]),
            params: SeqParams { temperature: 0.5, ..SeqParams::default() },
            class: crate::window::Class::Batch,
            keep_tokens: 0,
            stream: 0,
            due: crate::engine::Due::NEVER,
        };
        let with = |change: &dyn Fn(&mut SeqParams)| {
            let mut submission = base();
            change(&mut submission.params);
            key("m", &submission).unwrap()
        };
        let mut keys = vec![
            key("m", &base()).unwrap(),
            key("other", &base()).unwrap(),
            key("m", &Submission { prompt: Arc::new([1, 2]), ..base() }).unwrap(),
            with(&|p| p.max_tokens += 1),
            with(&|p| p.temperature = 0.6),
            with(&|p| p.top_p = 0.5),
            with(&|p| p.top_k = 5),
            with(&|p| p.min_p = 0.5),
            with(&|p| p.presence_penalty = 0.5),
            with(&|p| p.frequency_penalty = 0.5),
            with(&|p| p.repetition_penalty = 1.5),
            with(&|p| p.logit_bias = vec![(1, 0.5)]),
            with(&|p| p.logit_bias = vec![(1, 0.5), (2, 0.5)]),
            with(&|p| p.min_tokens = 1),
            with(&|p| p.stop_tokens = vec![1]),
            with(&|p| p.score_from = Some(1)),
            with(&|p| p.seed = 9),
            with(&|p| p.choice = 1),
            with(&|p| p.stop = vec!["a".into()]),
            with(&|p| p.ignore_eos = true),
            with(&|p| p.repetition = Repetition::new(1, 2, 3).ok()),
            with(&|p| p.repetition = Repetition::new(1, 3, 2).ok()),
            with(&|p| p.logprobs = Some(0)),
        ];
        let n_keys = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), n_keys);
        // What no result depends on.
        let due = crate::engine::Due::window(1, 1);
        let named = Submission { id: 2, keep_tokens: 3, stream: 1, due, ..base() };
        assert_eq!(key("m", &named), key("m", &base()));
        let greedy = |seed| with(&move |p| (p.temperature, p.seed) = (0.0, seed));
        assert_eq!(greedy(1), greedy(2));
    }
}
