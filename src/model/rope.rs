//! Rotary frequencies and how models that were stretched to a longer context change them. Knows no file format.

/// How frequencies are changed for contexts longer than those a model was first trained for.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by a factor (Chen et al. 2023, position interpolation).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Low frequencies divided, high ones kept, those between blended (Llama 3.1).
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Frequencies of fewer turns within the original context are low.
        low_turns: f32,
        /// Frequencies of more turns are high.
        high_turns: f32,
        /// Positions of the original context.
        original_context: usize,
    },
    /// Each divided by a factor of its own (`LongRoPE`, and files that list the divisors), rotated elements multiplied.
    Divisors {
        /// One per frequency.
        divisors: Vec<f32>,
        /// Multiplier of the rotated elements.
        scale: f32,
    },
}

/// base^(-2i / `rope_dim`) for each pair i, scaled, in radians per position; and the multiplier of rotated elements.
/// Rounded once from f64 (not by the system's pow, whose last bits differ from machine to machine).
pub fn frequencies(base: f32, rope_dim: usize, scaling: &RopeScaling) -> (Vec<f32>, f32) {
    let plain = (0..rope_dim / 2).map(|i| libm::pow(f64::from(base), -2.0 * i as f64 / rope_dim as f64));
    match scaling {
        RopeScaling::None => (plain.map(|freq| freq as f32).collect(), 1.0),
        RopeScaling::Linear { factor } => (plain.map(|freq| (freq / f64::from(*factor)) as f32).collect(), 1.0),
        RopeScaling::Llama3 { factor, low_turns, high_turns, original_context } => {
            let (low, high) = (f64::from(*low_turns), f64::from(*high_turns));
            let scaled = |freq: f64| {
                let turns = *original_context as f64 * freq / std::f64::consts::TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (freq * kept + freq / f64::from(*factor) * (1.0 - kept)) as f32
            };
            (plain.map(scaled).collect(), 1.0)
        }
        RopeScaling::Divisors { divisors, scale } => {
            assert_eq!(divisors.len(), rope_dim / 2, "divisors were counted when the file was read");
            (plain.zip(divisors).map(|(freq, &divisor)| (freq / f64::from(divisor)) as f32).collect(), *scale)
        }
    }
}

/// The multiplier of `LongRoPE`'s rotated elements for a context stretched by `factor`, where the file names none.
pub fn long_rope_scale(factor: f32, original_context: usize) -> f32 {
    if factor <= 1.0 {
        return 1.0;
    }
    (1.0 + libm::log(f64::from(factor)) / libm::log(original_context as f64)).sqrt() as f32
}
