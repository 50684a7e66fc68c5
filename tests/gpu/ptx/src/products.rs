//! Registers of products of warpgroups, which the tensor cores use while the threads go on: who touches them when, found from the text.
//!
//! The ISA asks for a `wgmma.fence` before the first product, and between any other access of an operand's register and a product
//! that has it; and that nobody touches operands before the product has been waited for.

use crate::inst::{Inst, Op};
use crate::registers::{Set, blocks, visit};

/// Notes of each instruction which operands of products it touches, and of each product whether some way leads to it on which one
/// of its operands was touched after the last fence. Registers still have the numbers of the text.
pub(crate) fn note(code: &mut [Inst], n_registers: usize) {
    let empty = Set(vec![0; n_registers.div_ceil(64)]);
    let mut operands = empty.clone();
    for inst in code.iter() {
        if let Op::Product(product) = &inst.op {
            product.sums.iter().chain(&product.factors).for_each(|&r| operands.add(r));
        }
    }
    if operands == empty {
        return;
    }
    for inst in code.iter_mut().filter(|inst| !matches!(inst.op, Op::Product(_))) {
        let mut held = Vec::new();
        visit(&mut inst.op, &mut |r, _| {
            if operands.has(*r) {
                held.push(*r);
            }
        });
        inst.held = held;
    }
    let blocks = blocks(code, n_registers);
    // Of each stretch: what may have been touched since the last fence when it begins. At first, everything.
    let mut touched = vec![empty; blocks.len()];
    touched[0] = operands;
    let mut left: Vec<usize> = (0..blocks.len()).rev().collect();
    while let Some(i) = left.pop() {
        let block = &blocks[i];
        let end = through(&mut code[block.start..block.end], touched[i].clone());
        for &next in &block.next {
            let before = touched[next].clone();
            for (to, from) in touched[next].0.iter_mut().zip(&end.0) {
                *to |= from;
            }
            if touched[next] != before {
                left.push(next);
            }
        }
    }
}

/// What is touched when these instructions have been executed; products among them are told.
fn through(code: &mut [Inst], mut touched: Set) -> Set {
    for inst in code {
        match &mut inst.op {
            // Under a predicate it may be none.
            Op::ProductFence if inst.guard.is_none() => touched.0.fill(0),
            Op::Product(product) => {
                product.unfenced |= product.sums.iter().chain(&product.factors).any(|&r| touched.has(r));
            }
            _ => inst.held.iter().for_each(|&r| touched.add(r)),
        }
    }
    touched
}
