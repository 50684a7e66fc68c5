//! Floats: formats that Rust has no type for, and results rounded once, in the direction asked for.

/// Rounding of a result, as the modifiers `.rn`, `.rz`, `.rm`, `.rp` say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Nearest,
    Zero,
    Down,
    Up,
}

/// a + b, rounded to odd: the last bit is set where the sum is not exact, so that rounding again, to a format with at least
/// two bits less, gives what rounding the exact sum gives.
pub(crate) fn add_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    // Knuth's two-sum: the exact error of the rounded sum.
    let other = sum - a;
    let error = (a - (sum - other)) + (b - other);
    let bits = sum.to_bits();
    // False for NaN, which infinities leave.
    let inexact = error.abs() > 0.0;
    // Away from zero if the error has the sum's sign, else towards it.
    let away = (error > 0.0) == (sum > 0.0);
    let odd = if away { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
    f64::from_bits(if inexact && bits & 1 == 0 { odd } else { bits })
}

/// a * b + c of f32, before its one rounding: the product of two f32 is exact in f64.
pub(crate) fn fma_odd(a: f32, b: f32, c: f32) -> f64 {
    add_odd(f64::from(a) * f64::from(b), f64::from(c))
}

/// Rounds to f32.
pub(crate) fn to_f32(x: f64, mode: Mode) -> f32 {
    let nearest = x as f32;
    let back = f64::from(nearest);
    let too_far = match mode {
        Mode::Nearest => false,
        Mode::Zero => back.abs() > x.abs(),
        Mode::Down => back > x,
        Mode::Up => back < x,
    };
    match (too_far, mode) {
        (false, _) => nearest,
        (true, Mode::Up) => nearest.next_up(),
        (true, Mode::Zero) if x < 0.0 => nearest.next_up(),
        (true, _) => nearest.next_down(),
    }
}

/// Subnormals become zeros of their sign (`.ftz`).
pub(crate) fn flush(x: f32) -> f32 {
    if x.is_subnormal() { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}

pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// To bf16, to nearest even; NaN is 0x7FFF.
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() { 0x7FFF } else { ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16 }
}

pub(crate) fn from_f16(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let exponent = u32::from(bits >> 10 & 0x1F);
    let fraction = u32::from(bits & 0x3FF);
    let magnitude = match exponent {
        // Subnormal: a multiple of 2^-24.
        0 => (fraction as f32 * f32::from_bits(0x3380_0000)).to_bits(),
        31 => 0x7F80_0000 | fraction << 13,
        _ => (exponent + 112) << 23 | fraction << 13,
    };
    f32::from_bits(sign | magnitude)
}

/// To f16, to nearest even; too large is infinite; NaN is 0x7FFF.
pub(crate) fn to_f16(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7FFF;
    }
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let magnitude = x.abs();
    let bits = if magnitude >= 65520.0 {
        0x7C00
    } else if magnitude < f32::from_bits(0x3880_0000) {
        // Below 2^-14: a multiple of 2^-24; 1024 of them are the smallest normal number, whose bits those are.
        (magnitude * 16_777_216.0).round_ties_even() as u16
    } else {
        let bits = magnitude.to_bits();
        ((bits + 0xFFF + (bits >> 13 & 1) - (112 << 23)) >> 13) as u16
    };
    sign | bits
}

/// An 8-bit float format: bits of its fraction, bias of its exponent, largest finite value's bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Small {
    fraction: u32,
    bias: i32,
    largest: u8,
    infinite: bool,
}
/// 4 exponent bits, 3 of fraction; no infinity; NaN is 0x7F.
pub(crate) const E4M3: Small = Small { fraction: 3, bias: 7, largest: 0x7E, infinite: false };
/// 5 exponent bits, 2 of fraction; infinity is 0x7C.
pub(crate) const E5M2: Small = Small { fraction: 2, bias: 15, largest: 0x7B, infinite: true };

impl Small {
    pub(crate) fn decode(self, bits: u8) -> f32 {
        let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
        let magnitude = bits & 0x7F;
        if magnitude > self.largest {
            return if self.infinite && magnitude == self.largest + 1 { sign * f32::INFINITY } else { f32::NAN };
        }
        let exponent = i32::from(magnitude >> self.fraction);
        let fraction = f32::from(magnitude & ((1 << self.fraction) - 1)) / f32::from(1u8 << self.fraction);
        let value =
            if exponent == 0 { fraction * 2f32.powi(1 - self.bias) } else { (1.0 + fraction) * 2f32.powi(exponent - self.bias) };
        sign * value
    }

    /// To nearest even; what is too large, infinities too, is the largest finite value (`.satfinite`); NaN is 0x7F.
    pub(crate) fn encode(self, x: f32) -> u8 {
        if x.is_nan() {
            return 0x7F;
        }
        let sign = if x.is_sign_negative() { 0x80 } else { 0 };
        let magnitude = f64::from(x.abs());
        if magnitude >= f64::from(self.decode(self.largest)) {
            return sign | self.largest;
        }
        let smallest = 1 - self.bias;
        let exponent = (((magnitude.to_bits() >> 52) as i32) - 1023).max(smallest);
        let unit = 2f64.powi(exponent - self.fraction as i32);
        let units = (magnitude / unit).round_ties_even() as i32;
        // The bits of adjacent numbers are adjacent: a fraction that overflows carries into the exponent.
        let bits = ((exponent - smallest) << self.fraction) + units;
        sign | u8::try_from(bits).unwrap_or(self.largest).min(self.largest)
    }
}
