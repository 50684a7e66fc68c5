//! Bodies of kernels: scopes, registers, labels; functions are put where they are called.

use crate::ParseError;
use crate::decode::decode;
use crate::inst::{Cond, Const, Inst, Op, P, R, Special};
use crate::lex::Token;
use crate::module::{Cursor, Draft, Kernel, VarSpace, declared, type_bytes, variable};
use crate::operand::{Operand, operands};
use crate::registers::share;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Functions that call functions, at most so deep: recursion is refused.
const MAX_DEPTH: usize = 16;

/// A kernel or function as declared.
pub(crate) struct Function {
    pub(crate) name: String,
    /// Name, bytes and alignment of what is returned and of what is given.
    pub(crate) returned: Vec<(String, usize, usize)>,
    pub(crate) given: Vec<(String, usize, usize)>,
    /// Index of the token behind the body's `{`.
    pub(crate) body: Option<usize>,
    pub(crate) max_threads: Option<u32>,
}

#[derive(Debug, Clone)]
pub(crate) enum Named {
    Register(R, u32),
    Predicate(P),
    /// A constant address and its state space.
    Address(Const),
    Table(Vec<String>),
    /// A parameter of a call, by number: each offset of it that is used is a register.
    Call(usize),
    KernelParam(usize),
}

#[derive(Default)]
struct Scope {
    names: HashMap<String, Named>,
    id: usize,
}

/// A label that is used by an instruction, and the scopes that it may stand in, innermost last.
struct Fixup {
    inst: usize,
    labels: Vec<String>,
    scopes: Vec<usize>,
    line: u32,
}

pub(crate) struct Body<'t> {
    draft: &'t Draft,
    tokens: &'t [Token<'t>],
    code: Vec<Inst>,
    opcodes: HashMap<String, usize>,
    scopes: Vec<Scope>,
    n_scopes: usize,
    labels: HashMap<(usize, String), usize>,
    fixups: Vec<Fixup>,
    calls: HashMap<(usize, i64), R>,
    n_calls: usize,
    depth: usize,
    n_registers: usize,
    n_predicates: usize,
    constants: HashMap<Const, R>,
    shared: usize,
    local: usize,
    params: Vec<(usize, usize)>,
    loc: (u32, u32),
    line: u32,
}

impl<'t> Body<'t> {
    pub(crate) fn new(draft: &'t Draft, tokens: &'t [Token<'t>]) -> Self {
        Self {
            draft,
            tokens,
            code: Vec::new(),
            opcodes: HashMap::new(),
            scopes: Vec::new(),
            n_scopes: 0,
            labels: HashMap::new(),
            fixups: Vec::new(),
            calls: HashMap::new(),
            n_calls: 0,
            depth: 0,
            // Register and predicate 0 take what nobody wants.
            n_registers: 1,
            n_predicates: 1,
            constants: HashMap::new(),
            shared: 0,
            local: 0,
            params: Vec::new(),
            loc: (0, 0),
            line: 0,
        }
    }

    pub(crate) fn kernel(mut self, entry: &Function, files: Arc<BTreeMap<u32, String>>) -> Result<Kernel, ParseError> {
        self.open();
        let mut end = 0usize;
        for (name, bytes, align) in &entry.given {
            end = end.next_multiple_of((*align).max(1));
            self.declare(name, Named::KernelParam(end));
            self.params.push((end, *bytes));
            end += bytes;
        }
        if let Some(at) = entry.body {
            self.statements(&mut Cursor { tokens: self.tokens, at })?;
        }
        self.push(Op::Exit, None, "ret");
        self.resolve()?;
        let mut opcodes = vec![String::new(); self.opcodes.len()];
        for (name, at) in self.opcodes {
            opcodes[at] = name;
        }
        let mut constants: Vec<_> = self.constants.into_iter().map(|(constant, r)| (r, constant)).collect();
        constants.sort_by_key(|(r, _)| *r);
        crate::products::note(&mut self.code, self.n_registers);
        let registers = share(&mut self.code, &mut constants, self.n_registers);
        Ok(Kernel {
            name: entry.name.clone(),
            code: self.code,
            opcodes,
            params: self.params,
            n_registers: registers.n,
            unwritten: registers.unwritten,
            n_predicates: self.n_predicates,
            constants,
            static_shared: self.shared,
            dynamic_align: self.draft.variables.iter().filter(|v| v.unsized_).map(|v| v.align).fold(16, usize::max),
            local: self.local,
            max_threads: entry.max_threads,
            files,
        })
    }

    pub(crate) fn error(&self, message: impl Into<String>) -> ParseError {
        ParseError::new(self.line, message)
    }

    fn open(&mut self) {
        self.scopes.push(Scope { names: HashMap::new(), id: self.n_scopes });
        self.n_scopes += 1;
    }

    fn declare(&mut self, name: &str, named: Named) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.names.insert(name.to_owned(), named);
        }
    }

    /// Statements up to the brace that closes the scope, which is taken too.
    fn statements(&mut self, text: &mut Cursor) -> Result<(), ParseError> {
        loop {
            self.line = text.line();
            if text.next_is('}') {
                text.at += 1;
                return Ok(());
            }
            if text.next_is('{') {
                text.at += 1;
                self.open();
                self.statements(text)?;
                self.scopes.pop();
                continue;
            }
            let guard = self.guard(text)?;
            let word = text.word()?;
            if text.next_is(':') {
                text.at += 1;
                self.label(word, text)?;
            } else if word.starts_with('.') {
                self.directive(word, text)?;
            } else {
                let operands = operands(text)?;
                self.instruction(guard, word, &operands)?;
            }
        }
    }

    fn guard(&self, text: &mut Cursor) -> Result<Option<Cond>, ParseError> {
        if !text.next_is('@') {
            return Ok(None);
        }
        text.at += 1;
        let negate = text.next_is('!');
        text.at += usize::from(negate);
        let p = text.word()?;
        Ok(Some(Cond { p: self.predicate(p)?, negate }))
    }

    fn label(&mut self, name: &str, text: &mut Cursor) -> Result<(), ParseError> {
        // A table of branch targets is declared like a label.
        if text.peek().and_then(Token::word) == Some(".branchtargets") {
            text.at += 1;
            let names = operands(text)?;
            let names = names.into_iter().filter_map(|o| if let Operand::Name(name) = o { Some(name.to_owned()) } else { None });
            self.declare(name, Named::Table(names.collect()));
            return Ok(());
        }
        let scope = self.scopes.last().map_or(0, |s| s.id);
        if self.labels.insert((scope, name.to_owned()), self.code.len()).is_some() {
            return Err(self.error(format!("label {name} twice")));
        }
        Ok(())
    }

    fn directive(&mut self, word: &str, text: &mut Cursor) -> Result<(), ParseError> {
        match word {
            ".loc" => {
                let (file, line) = (text.number()?, text.number()?);
                self.loc = (u32::try_from(file).unwrap_or(0), u32::try_from(line).unwrap_or(0));
                text.at -= 1;
                text.skip_line();
            }
            ".reg" => self.registers(text)?,
            ".shared" | ".local" | ".global" | ".const" => {
                text.at -= 1;
                let variable = variable(text)?;
                let (space, bytes) = (variable.space, variable.bytes.len());
                let address = match space {
                    VarSpace::Shared if variable.unsized_ => Const::Dynamic(0),
                    VarSpace::Shared => Const::Value(self.take_shared(bytes, variable.align)),
                    VarSpace::Local => {
                        self.local = self.local.next_multiple_of(variable.align.max(1));
                        self.local += bytes;
                        Const::Value((self.local - bytes) as u64)
                    }
                    VarSpace::Global | VarSpace::Const => {
                        return Err(self.error("global and constant variables are known at the module's level alone"));
                    }
                };
                self.declare(&variable.name, Named::Address(address));
            }
            ".param" => {
                let (name, _, _) = declared(text)?;
                text.expect(';')?;
                self.n_calls += 1;
                self.declare(&name, Named::Call(self.n_calls));
            }
            ".pragma" => text.skip_past(';')?,
            _ => return Err(self.error(format!("unknown directive {word}"))),
        }
        Ok(())
    }

    fn take_shared(&mut self, bytes: usize, align: usize) -> u64 {
        self.shared = self.shared.next_multiple_of(align.max(1));
        self.shared += bytes;
        (self.shared - bytes) as u64 + crate::memory::SHARED_START
    }

    /// `.reg .b32 %r<10>;` or `.reg .pred p, q;`
    fn registers(&mut self, text: &mut Cursor) -> Result<(), ParseError> {
        let kind = text.word()?;
        let bits = type_bytes(kind).map(|bytes| u32::try_from(bytes * 8).unwrap_or(64));
        if bits.is_none() && kind != ".pred" {
            return Err(self.error(format!("registers of type {kind} are not known")));
        }
        loop {
            let name = text.word()?;
            if text.next_is('<') {
                text.at += 1;
                let n = text.number()?;
                text.expect('>')?;
                for i in 0..n {
                    self.register(&format!("{name}{i}"), bits);
                }
            } else {
                self.register(name, bits);
            }
            if !text.next_is(',') {
                return text.expect(';');
            }
            text.at += 1;
        }
    }

    fn register(&mut self, name: &str, bits: Option<u32>) {
        let named = match bits {
            Some(bits) => Named::Register(self.new_register(), bits),
            None => Named::Predicate(self.new_predicate()),
        };
        self.declare(name, named);
    }

    pub(crate) fn new_register(&mut self) -> R {
        self.n_registers += 1;
        self.n_registers - 1
    }

    pub(crate) fn new_predicate(&mut self) -> P {
        self.n_predicates += 1;
        self.n_predicates - 1
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Named> {
        self.scopes.iter().rev().find_map(|scope| scope.names.get(name))
    }

    pub(crate) fn predicate(&self, name: &str) -> Result<P, ParseError> {
        match self.find(name) {
            Some(Named::Predicate(p)) => Ok(*p),
            _ => Err(self.error(format!("{name} is no predicate"))),
        }
    }

    /// The register that holds a constant.
    pub(crate) fn constant(&mut self, value: Const) -> R {
        if let Some(&r) = self.constants.get(&value) {
            return r;
        }
        let r = self.new_register();
        self.constants.insert(value, r);
        r
    }

    /// The address of a variable, if there is one of that name.
    pub(crate) fn variable(&mut self, name: &str, offset: i64) -> Option<Const> {
        match self.find(name) {
            Some(Named::Address(Const::Value(address))) => return Some(Const::Value(address.wrapping_add_signed(offset))),
            Some(Named::Address(Const::Dynamic(_))) => return Some(Const::Dynamic(offset)),
            Some(Named::KernelParam(at)) => return Some(Const::Value((*at as u64).wrapping_add_signed(offset))),
            Some(_) => return None,
            None => {}
        }
        let index = self.draft.variables.iter().position(|v| v.name == name)?;
        let variable = &self.draft.variables[index];
        match variable.space {
            VarSpace::Shared if variable.unsized_ => Some(Const::Dynamic(offset)),
            VarSpace::Shared => {
                let (bytes, align) = (variable.bytes.len(), variable.align);
                let address = self.take_shared(bytes, align);
                // Known by its name from here on, in all scopes of the kernel.
                self.scopes.first_mut()?.names.insert(name.to_owned(), Named::Address(Const::Value(address)));
                Some(Const::Value(address.wrapping_add_signed(offset)))
            }
            _ => Some(Const::Variable(index, offset)),
        }
    }

    /// The register of a call's parameter at an offset.
    pub(crate) fn call_slot(&mut self, call: usize, offset: i64, write: bool) -> Result<R, ParseError> {
        if let Some(&r) = self.calls.get(&(call, offset)) {
            return Ok(r);
        }
        if !write {
            return Err(self.error("a part of a call's parameter is read that was not written in that form"));
        }
        let r = self.new_register();
        self.calls.insert((call, offset), r);
        Ok(r)
    }

    pub(crate) fn in_params(&self, offset: usize) -> bool {
        self.params.iter().any(|(at, size)| (*at..at + size).contains(&offset))
    }

    fn push(&mut self, op: Op, guard: Option<Cond>, opcode: &str) {
        let n = self.opcodes.len();
        let opcode = match self.opcodes.get(opcode) {
            Some(&known) => known,
            None => *self.opcodes.entry(opcode.to_owned()).or_insert(n),
        };
        self.code.push(Inst { guard, op, line: self.line, loc: self.loc, opcode, held: Vec::new() });
    }

    fn instruction(&mut self, guard: Option<Cond>, opcode: &str, operands: &[Operand]) -> Result<(), ParseError> {
        let base = opcode.split('.').next().unwrap_or("");
        match (base, operands) {
            ("bra", [Operand::Name(label)]) => {
                self.fixup(vec![(*label).to_owned()]);
                self.push(Op::Branch { target: 0, uniform: opcode == "bra.uni" }, guard, opcode);
            }
            ("brx", [index, Operand::Name(table)]) => {
                let Some(Named::Table(labels)) = self.find(table).cloned() else {
                    return Err(self.error(format!("{table} is no table of labels")));
                };
                let index = self.src(index, 32)?;
                self.fixup(labels);
                self.push(Op::BranchTable { index, targets: Vec::new() }, guard, opcode);
            }
            ("call", _) => self.call(guard, operands)?,
            ("ret", []) if self.depth > 0 => {
                self.fixup(vec!["end of function".to_owned()]);
                self.push(Op::Branch { target: 0, uniform: false }, guard, opcode);
            }
            _ => {
                for op in decode(self, opcode, operands)? {
                    self.push(op, guard, opcode);
                }
            }
        }
        Ok(())
    }

    fn fixup(&mut self, labels: Vec<String>) {
        let scopes = self.scopes.iter().map(|s| s.id).collect();
        self.fixups.push(Fixup { inst: self.code.len(), labels, scopes, line: self.line });
    }

    /// `call (returned), function, (given)`: the function's body, with the call's parameters for its own.
    fn call(&mut self, guard: Option<Cond>, given: &[Operand]) -> Result<(), ParseError> {
        let (returned, rest) = if matches!(given.first(), Some(Operand::List(_))) {
            (names(given.first()), &given[1..])
        } else {
            (Vec::new(), given)
        };
        let Some(Operand::Name(name)) = rest.first() else { return Err(self.error("a call of a pointer is not known")) };
        if *name == "__assertfail" {
            self.push(Op::Trap, guard, "call.__assertfail");
            return Ok(());
        }
        let draft = self.draft;
        let function = draft.functions.get(*name).ok_or_else(|| self.error(format!("{name} is not defined in this text")))?;
        let Some(at) = function.body else { return Err(self.error(format!("{name} has no body"))) };
        if guard.is_some() || self.depth >= MAX_DEPTH {
            return Err(self.error("calls under a predicate and recursion are not known"));
        }
        let mut pairs = Vec::new();
        for (formal, actual) in function.returned.iter().zip(&returned).chain(function.given.iter().zip(&names(rest.get(1)))) {
            let Operand::Name(actual) = actual else { return Err(self.error("a call's parameter must be a name")) };
            let named = self.find(actual).cloned().ok_or_else(|| self.error(format!("{actual} is not declared")))?;
            pairs.push((formal.0.clone(), named));
        }
        // The function knows none of the caller's names.
        let outer = std::mem::take(&mut self.scopes);
        let (line, loc) = (self.line, self.loc);
        self.open();
        for (formal, named) in pairs {
            self.declare(&formal, named);
        }
        self.depth += 1;
        let scope = self.n_scopes - 1;
        self.statements(&mut Cursor { tokens: self.tokens, at })?;
        self.labels.insert((scope, "end of function".to_owned()), self.code.len());
        self.depth -= 1;
        self.scopes = outer;
        (self.line, self.loc) = (line, loc);
        Ok(())
    }

    fn resolve(&mut self) -> Result<(), ParseError> {
        for fixup in &self.fixups {
            let mut targets = Vec::new();
            for label in &fixup.labels {
                let found = fixup.scopes.iter().rev().find_map(|scope| self.labels.get(&(*scope, label.clone())));
                targets.push(*found.ok_or_else(|| ParseError::new(fixup.line, format!("no label {label}")))?);
            }
            match &mut self.code[fixup.inst].op {
                Op::Branch { target, .. } => *target = targets[0],
                Op::BranchTable { targets: table, .. } => *table = targets,
                _ => {}
            }
        }
        Ok(())
    }
}

/// The parameters of a call in parentheses.
fn names<'t>(operand: Option<&Operand<'t>>) -> Vec<Operand<'t>> {
    match operand {
        Some(Operand::List(list)) => list.clone(),
        _ => Vec::new(),
    }
}

/// A special register.
pub(crate) fn special(name: &str) -> Option<Special> {
    let axis = |kind: fn(usize) -> Special| match name.as_bytes().last() {
        Some(b'x') => Some(kind(0)),
        Some(b'y') => Some(kind(1)),
        Some(b'z') => Some(kind(2)),
        _ => None,
    };
    match name.split_once('.').map_or(name, |(base, _)| base) {
        "%tid" => axis(Special::Tid),
        "%ntid" => axis(Special::Ntid),
        "%ctaid" => axis(Special::Ctaid),
        "%nctaid" => axis(Special::Nctaid),
        "%laneid" => Some(Special::Lane),
        "%warpid" => Some(Special::Warp),
        "%nwarpid" => Some(Special::Nwarp),
        "%lanemask_eq" => Some(Special::MaskEq),
        "%lanemask_lt" => Some(Special::MaskLt),
        "%lanemask_le" => Some(Special::MaskLe),
        "%lanemask_gt" => Some(Special::MaskGt),
        "%lanemask_ge" => Some(Special::MaskGe),
        "%dynamic_smem_size" => Some(Special::DynamicSharedSize),
        "%total_smem_size" => Some(Special::TotalSharedSize),
        _ => None,
    }
}
