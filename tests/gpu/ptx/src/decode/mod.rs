//! Opcodes to operations. Every modifier must be taken by somebody: what is left over makes the opcode an unknown one.

mod arithmetic;
mod asynchronous;
mod bits;
mod compare;
mod convert;
mod floating;
mod halves;
mod memory;
mod product;
mod tensor;
mod warp;

use crate::ParseError;
use crate::body::{Body, Named, special};
use crate::inst::{Address, Cond, Const, Op, P, R, Space};
use crate::operand::Operand;

/// A type of the ISA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ty {
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    B8,
    B16,
    B32,
    B64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    E4m3x2,
    E5m2x2,
    Pred,
}

impl Ty {
    pub(crate) fn named(word: &str) -> Option<Self> {
        Some(match word {
            "u8" => Self::U8,
            "u16" => Self::U16,
            "u32" => Self::U32,
            "u64" => Self::U64,
            "s8" => Self::S8,
            "s16" => Self::S16,
            "s32" => Self::S32,
            "s64" => Self::S64,
            "b8" => Self::B8,
            "b16" => Self::B16,
            "b32" => Self::B32,
            "b64" => Self::B64,
            "f16" => Self::F16,
            "f16x2" => Self::F16x2,
            "bf16" => Self::Bf16,
            "bf16x2" => Self::Bf16x2,
            "tf32" => Self::Tf32,
            "f32" => Self::F32,
            "f64" => Self::F64,
            "e4m3x2" => Self::E4m3x2,
            "e5m2x2" => Self::E5m2x2,
            "pred" => Self::Pred,
            _ => return None,
        })
    }

    pub(crate) fn bits(self) -> u32 {
        match self {
            Self::Pred => 1,
            Self::U8 | Self::S8 | Self::B8 => 8,
            Self::U16 | Self::S16 | Self::B16 | Self::F16 | Self::Bf16 | Self::E4m3x2 | Self::E5m2x2 => 16,
            Self::U32 | Self::S32 | Self::B32 | Self::F16x2 | Self::Bf16x2 | Self::Tf32 | Self::F32 => 32,
            Self::U64 | Self::S64 | Self::B64 | Self::F64 => 64,
        }
    }

    pub(crate) fn signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }

    pub(crate) fn integer(self) -> bool {
        self.signed()
            || matches!(self, Self::U8 | Self::U16 | Self::U32 | Self::U64 | Self::B8 | Self::B16 | Self::B32 | Self::B64)
    }
}

/// The modifiers of an opcode; each is to be taken once.
pub(crate) struct Mods<'a> {
    left: Vec<&'a str>,
}

impl<'a> Mods<'a> {
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        let found = self.left.iter().position(|m| *m == name);
        if let Some(at) = found {
            self.left.remove(at);
        }
        found.is_some()
    }

    /// The first of these modifiers that is there.
    pub(crate) fn choose<T: Copy>(&mut self, choices: &[(&str, T)]) -> Option<T> {
        choices.iter().find(|(name, _)| self.flag(name)).map(|(_, choice)| *choice)
    }

    pub(crate) fn ty(&mut self) -> Option<Ty> {
        let at = self.left.iter().position(|m| Ty::named(m).is_some())?;
        Ty::named(self.left.remove(at))
    }

    pub(crate) fn next(&mut self) -> Option<&'a str> {
        if self.left.is_empty() { None } else { Some(self.left.remove(0)) }
    }
}

/// What one statement is. `None` of a family: no such operation, type or modifier is known.
type Decoded = Result<Option<Vec<Op>>, ParseError>;

pub(crate) fn decode(body: &mut Body, opcode: &str, o: &[Operand]) -> Result<Vec<Op>, ParseError> {
    let mut words = opcode.split('.');
    let base = words.next().unwrap_or("");
    let mut mods = Mods { left: words.collect() };
    let m = &mut mods;
    let families = [
        memory::decode,
        bits::decode,
        convert::decode,
        compare::decode,
        warp::decode,
        asynchronous::decode,
        asynchronous::decode_barriers,
        tensor::decode,
        product::decode,
        halves::decode,
        floating::decode,
        arithmetic::decode,
    ];
    for family in families {
        let before = m.left.clone();
        match family(body, base, m, o)? {
            Some(ops) if m.left.is_empty() => return Ok(ops),
            // Another family may know these modifiers.
            _ => m.left = before,
        }
    }
    Err(body.error(format!("{opcode} with {} operands is not known", o.len())))
}

impl Body<'_> {
    /// A register that is read, or one that holds the constant. `bits`: the width of the operation.
    pub(crate) fn src(&mut self, operand: &Operand, bits: u32) -> Result<R, ParseError> {
        let mask = u64::MAX >> (64 - bits.clamp(1, 64));
        match operand {
            Operand::Number(value) => Ok(self.constant(Const::Value(value & mask))),
            Operand::Decimal(value) => {
                let value = if bits == 32 { u64::from((*value as f32).to_bits()) } else { value.to_bits() };
                Ok(self.constant(Const::Value(value)))
            }
            Operand::Name(name) => self.named(name, 0, bits),
            Operand::Sum(name, offset) => self.named(name, *offset, bits),
            _ => Err(self.error("a register or a number was expected")),
        }
    }

    fn named(&mut self, name: &str, offset: i64, bits: u32) -> Result<R, ParseError> {
        if let Some(Named::Register(r, width)) = self.find(name) {
            let (r, width) = (*r, *width);
            if width < bits || offset != 0 {
                return Err(self.error(format!("{name} has {width} bits, the operation {bits}")));
            }
            return Ok(r);
        }
        if name == "WARP_SZ" {
            return Ok(self.constant(Const::Value(32)));
        }
        if let Some(special) = special(name) {
            return Ok(self.constant(Const::Special(special)));
        }
        match self.variable(name, offset) {
            Some(address) => Ok(self.constant(address)),
            None => Err(self.error(format!("{name} is not known"))),
        }
    }

    /// A register that is written; `_` is nobody's.
    pub(crate) fn dst(&mut self, operand: &Operand) -> Result<R, ParseError> {
        match operand {
            Operand::Name(name) if *name == "_" => Ok(0),
            Operand::Name(name) => match self.find(name) {
                Some(Named::Register(r, _)) => Ok(*r),
                _ => Err(self.error(format!("{name} is no register that can be written"))),
            },
            _ => Err(self.error("a register was expected")),
        }
    }

    /// Declared width of a register; of anything else, 64.
    pub(crate) fn width(&self, operand: &Operand) -> u32 {
        match operand {
            Operand::Name(name) => match self.find(name) {
                Some(Named::Register(_, bits)) => *bits,
                _ => 64,
            },
            _ => 64,
        }
    }

    pub(crate) fn sources(&mut self, operand: &Operand, bits: u32) -> Result<Vec<R>, ParseError> {
        let parts = vector(operand);
        parts.iter().map(|part| self.src(part, bits)).collect()
    }

    pub(crate) fn targets(&mut self, operand: &Operand) -> Result<Vec<Option<R>>, ParseError> {
        let parts = vector(operand);
        parts.iter().map(|part| Ok(Some(self.dst(part)?).filter(|&r| r != 0))).collect()
    }

    pub(crate) fn registers_of(&mut self, operand: &Operand) -> Result<Vec<R>, ParseError> {
        let parts = vector(operand);
        parts.iter().map(|part| self.dst(part)).collect()
    }

    pub(crate) fn pred(&self, operand: &Operand) -> Result<P, ParseError> {
        match operand {
            Operand::Name(name) if *name == "_" => Ok(0),
            Operand::Name(name) => self.predicate(name),
            _ => Err(self.error("a predicate was expected")),
        }
    }

    pub(crate) fn cond(&self, operand: &Operand) -> Result<Cond, ParseError> {
        match operand {
            Operand::Not(name) => Ok(Cond { p: self.predicate(name)?, negate: true }),
            other => Ok(Cond { p: self.pred(other)?, negate: false }),
        }
    }

    pub(crate) fn address(&mut self, operand: &Operand, space: Space) -> Result<Address, ParseError> {
        let Operand::Memory(base, offset) = operand else { return Err(self.error("an address was expected")) };
        Ok(Address { space, base: self.src(base, 32)?, offset: *offset })
    }
}

/// The parts of a vector, or the one operand.
fn vector<'t>(operand: &Operand<'t>) -> Vec<Operand<'t>> {
    match operand {
        Operand::Vector(parts) => parts.clone(),
        other => vec![other.clone()],
    }
}

/// `d|p`, or `d` alone.
fn pair<'o, 't>(operand: &'o Operand<'t>) -> (&'o Operand<'t>, Option<&'o Operand<'t>>) {
    match operand {
        Operand::Pair(first, second) => (first, Some(second)),
        other => (other, None),
    }
}
