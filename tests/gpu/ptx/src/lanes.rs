//! Functions of lanes: one operation for a whole warp, chosen when an instruction is decoded.

use crate::inst::Lanes;

pub(crate) fn map1(d: &mut Lanes, a: &Lanes, f: impl Fn(u64) -> u64) {
    for i in 0..32 {
        d[i] = f(a[i]);
    }
}

pub(crate) fn map2(d: &mut Lanes, a: &Lanes, b: &Lanes, f: impl Fn(u64, u64) -> u64) {
    for i in 0..32 {
        d[i] = f(a[i], b[i]);
    }
}

pub(crate) fn map3(d: &mut Lanes, a: &Lanes, b: &Lanes, c: &Lanes, f: impl Fn(u64, u64, u64) -> u64) {
    for i in 0..32 {
        d[i] = f(a[i], b[i], c[i]);
    }
}

pub(crate) fn test2(a: &Lanes, b: &Lanes, f: impl Fn(u64, u64) -> bool) -> u32 {
    let mut bits = 0;
    for i in 0..32 {
        bits |= u32::from(f(a[i], b[i])) << i;
    }
    bits
}

/// A lane function of one operand, of u64 bits.
macro_rules! un {
    ($f:expr) => {
        (|d: &mut $crate::inst::Lanes, a: &$crate::inst::Lanes| $crate::lanes::map1(d, a, $f)) as $crate::inst::F1
    };
}
macro_rules! bin {
    ($f:expr) => {
        (|d: &mut $crate::inst::Lanes, a: &$crate::inst::Lanes, b: &$crate::inst::Lanes| $crate::lanes::map2(d, a, b, $f))
            as $crate::inst::F2
    };
}
macro_rules! tri {
    ($f:expr) => {
        (|d: &mut $crate::inst::Lanes, a: &$crate::inst::Lanes, b: &$crate::inst::Lanes, c: &$crate::inst::Lanes| {
            $crate::lanes::map3(d, a, b, c, $f)
        }) as $crate::inst::F3
    };
}
macro_rules! test {
    ($f:expr) => {
        (|a: &$crate::inst::Lanes, b: &$crate::inst::Lanes| $crate::lanes::test2(a, b, $f)) as $crate::inst::Compare
    };
}
/// One expression for all widths and signs of integers: a match over the type gives the lane function.
macro_rules! int1 {
    ($ty:expr, |$a:ident| $e:expr) => {
        match $ty {
            Ty::U16 | Ty::B16 => Some(un!(|x| {
                let $a = x as u16;
                u64::from($e)
            })),
            Ty::S16 => Some(un!(|x| {
                let $a = x as i16;
                u64::from(($e) as u16)
            })),
            Ty::U32 | Ty::B32 => Some(un!(|x| {
                let $a = x as u32;
                u64::from($e)
            })),
            Ty::S32 => Some(un!(|x| {
                let $a = x as i32;
                u64::from(($e) as u32)
            })),
            Ty::U64 | Ty::B64 => Some(un!(|x| {
                let $a = x;
                $e
            })),
            Ty::S64 => Some(un!(|x| {
                let $a = x as i64;
                ($e) as u64
            })),
            _ => None,
        }
    };
}
macro_rules! int2 {
    ($ty:expr, |$a:ident, $b:ident| $e:expr) => {
        match $ty {
            Ty::U16 | Ty::B16 => Some(bin!(|x, y| {
                let ($a, $b) = (x as u16, y as u16);
                u64::from($e)
            })),
            Ty::S16 => Some(bin!(|x, y| {
                let ($a, $b) = (x as i16, y as i16);
                u64::from(($e) as u16)
            })),
            Ty::U32 | Ty::B32 => Some(bin!(|x, y| {
                let ($a, $b) = (x as u32, y as u32);
                u64::from($e)
            })),
            Ty::S32 => Some(bin!(|x, y| {
                let ($a, $b) = (x as i32, y as i32);
                u64::from(($e) as u32)
            })),
            Ty::U64 | Ty::B64 => Some(bin!(|x, y| {
                let ($a, $b) = (x, y);
                $e
            })),
            Ty::S64 => Some(bin!(|x, y| {
                let ($a, $b) = (x as i64, y as i64);
                ($e) as u64
            })),
            _ => None,
        }
    };
}
/// A comparison of integers of any type.
macro_rules! cmp2 {
    ($ty:expr, |$a:ident, $b:ident| $e:expr) => {
        match $ty {
            Ty::U16 | Ty::B16 => Some(test!(|x, y| {
                let ($a, $b) = (x as u16, y as u16);
                $e
            })),
            Ty::S16 => Some(test!(|x, y| {
                let ($a, $b) = (x as i16, y as i16);
                $e
            })),
            Ty::U32 | Ty::B32 => Some(test!(|x, y| {
                let ($a, $b) = (x as u32, y as u32);
                $e
            })),
            Ty::S32 => Some(test!(|x, y| {
                let ($a, $b) = (x as i32, y as i32);
                $e
            })),
            Ty::U64 | Ty::B64 => Some(test!(|x, y| {
                let ($a, $b) = (x, y);
                $e
            })),
            Ty::S64 => Some(test!(|x, y| {
                let ($a, $b) = (x as i64, y as i64);
                $e
            })),
            _ => None,
        }
    };
}
pub(crate) use {bin, cmp2, int1, int2, test, tri, un};
