//! Operands as they are written.

use crate::ParseError;
use crate::module::{Cursor, number};

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Operand<'t> {
    /// A register, variable, label or function.
    Name(&'t str),
    /// A number: its bits, and whether they are those of a float of 32 or 64 bits.
    Number(u64),
    /// A decimal with a point, of whatever width its use has.
    Decimal(f64),
    /// `name+4`: an address within a variable.
    Sum(&'t str, i64),
    Vector(Vec<Operand<'t>>),
    /// `[base+offset]`.
    Memory(Box<Operand<'t>>, i64),
    /// `[base, {x, y}]`: a place in a tensor.
    Place(Box<Operand<'t>>, Vec<Operand<'t>>),
    /// `!p`.
    Not(&'t str),
    /// `p|q`: two results.
    Pair(Box<Operand<'t>>, Box<Operand<'t>>),
    /// `(a, b)`: parameters of a call.
    List(Vec<Operand<'t>>),
}

/// Operands up to the `;`, which is taken too.
pub(crate) fn operands<'t>(text: &mut Cursor<'t>) -> Result<Vec<Operand<'t>>, ParseError> {
    let mut found = Vec::new();
    while !text.next_is(';') {
        found.push(operand(text)?);
        if text.next_is(',') {
            text.at += 1;
        } else if !text.next_is(';') {
            return Err(text.error("',' or ';' was expected"));
        }
    }
    text.expect(';')?;
    Ok(found)
}

fn operand<'t>(text: &mut Cursor<'t>) -> Result<Operand<'t>, ParseError> {
    let first = simple(text)?;
    if text.next_is('|') {
        text.at += 1;
        return Ok(Operand::Pair(Box::new(first), Box::new(simple(text)?)));
    }
    Ok(first)
}

fn simple<'t>(text: &mut Cursor<'t>) -> Result<Operand<'t>, ParseError> {
    if text.next_is('{') {
        return Ok(Operand::Vector(list(text, '}')?));
    }
    if text.next_is('(') {
        return Ok(Operand::List(list(text, ')')?));
    }
    if text.next_is('!') {
        text.at += 1;
        return Ok(Operand::Not(text.word()?));
    }
    if text.next_is('[') {
        text.at += 1;
        let base = simple(text)?;
        if text.next_is(',') {
            text.at += 1;
            let at = list(text, '}')?;
            text.expect(']')?;
            return Ok(Operand::Place(Box::new(base), at));
        }
        text.expect(']')?;
        return Ok(match base {
            Operand::Sum(name, offset) => Operand::Memory(Box::new(Operand::Name(name)), offset),
            Operand::Name(_) | Operand::Number(_) => Operand::Memory(Box::new(base), 0),
            _ => return Err(text.error("an address of an unknown form")),
        });
    }
    let negative = text.next_is('-');
    text.at += usize::from(negative);
    let word = text.word()?;
    if word.starts_with(|c: char| c.is_ascii_digit()) {
        if let Some(value) = number(word) {
            return Ok(Operand::Number(if negative { value.wrapping_neg() } else { value }));
        }
        let value: f64 = word.parse().map_err(|_| text.error(format!("{word} is no number")))?;
        return Ok(Operand::Decimal(if negative { -value } else { value }));
    }
    if negative {
        return Err(text.error("a number was expected behind '-'"));
    }
    if text.next_is('+') {
        text.at += 1;
        return Ok(Operand::Sum(word, text.value()?.cast_signed()));
    }
    if text.next_is('-') {
        return Ok(Operand::Sum(word, text.value()?.cast_signed()));
    }
    Ok(Operand::Name(word))
}

fn list<'t>(text: &mut Cursor<'t>, end: char) -> Result<Vec<Operand<'t>>, ParseError> {
    text.at += 1;
    let mut found = Vec::new();
    while !text.next_is(end) {
        found.push(operand(text)?);
        if text.next_is(',') {
            text.at += 1;
        }
    }
    text.expect(end)?;
    Ok(found)
}
