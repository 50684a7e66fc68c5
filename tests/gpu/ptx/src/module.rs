//! A module: kernels, functions and variables of a PTX text.

use crate::ParseError;
use crate::body::{Body, Function};
use crate::inst::{Const, Inst, R};
use crate::lex::{Kind, Token, tokens};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A parsed PTX text: every instruction of every kernel in it is known and decoded.
#[derive(Debug, Clone)]
pub struct Module {
    pub(crate) kernels: BTreeMap<String, Arc<Kernel>>,
    pub(crate) variables: Vec<Variable>,
    pub(crate) id: u64,
}

/// What a kernel's declaration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelShape {
    /// Offset and size of each parameter in bytes.
    pub parameters: Vec<(usize, usize)>,
    /// Bytes of shared memory that the text declares.
    pub static_shared: usize,
    /// Bytes of local memory of a thread.
    pub local: usize,
    /// The most threads of a block, if the text says so.
    pub max_threads: Option<u32>,
}

#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Inst>,
    pub(crate) opcodes: Vec<String>,
    /// Offset and size of each parameter.
    pub(crate) params: Vec<(usize, usize)>,
    pub(crate) n_registers: usize,
    /// Registers that may be read before they are written.
    pub(crate) unwritten: Vec<R>,
    pub(crate) n_predicates: usize,
    pub(crate) constants: Vec<(R, Const)>,
    /// Bytes of shared memory that the text declares; dynamic shared memory begins behind them.
    pub(crate) static_shared: usize,
    /// What the beginning of dynamic shared memory is a multiple of.
    pub(crate) dynamic_align: usize,
    pub(crate) local: usize,
    /// Threads of a block: at most, exactly.
    pub(crate) max_threads: Option<u32>,
    pub(crate) files: Arc<BTreeMap<u32, String>>,
}

/// A variable in global or constant memory.
#[derive(Debug, Clone)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) space: VarSpace,
    pub(crate) align: usize,
    pub(crate) bytes: Vec<u8>,
    /// No size is given: dynamic shared memory.
    pub(crate) unsized_: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VarSpace {
    Global,
    Const,
    Shared,
    Local,
}

impl Module {
    /// Reads a PTX text. Fails with the line of the first thing that is not known, whatever kernel it is in: an instruction
    /// that is not executed exactly as the ISA says must never be passed over.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let tokens = tokens(text)?;
        let mut draft = Draft { files: BTreeMap::new(), variables: Vec::new(), functions: HashMap::new(), entries: Vec::new() };
        draft.read(&mut Cursor { tokens: &tokens, at: 0 })?;
        let files = Arc::new(std::mem::take(&mut draft.files));
        let mut kernels = BTreeMap::new();
        for entry in &draft.entries {
            let kernel = Body::new(&draft, &tokens).kernel(entry, Arc::clone(&files))?;
            kernels.insert(entry.name.clone(), Arc::new(kernel));
        }
        Ok(Self { kernels, variables: draft.variables, id: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    /// Names of the kernels, in order.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }

    /// Names of the variables in global and constant memory.
    pub fn variables(&self) -> impl Iterator<Item = &str> {
        let lasting = |v: &&Variable| matches!(v.space, VarSpace::Global | VarSpace::Const);
        self.variables.iter().filter(lasting).map(|v| v.name.as_str())
    }

    /// What a launch of a kernel must know.
    pub fn shape(&self, kernel: &str) -> Option<KernelShape> {
        self.kernels.get(kernel).map(|kernel| KernelShape {
            parameters: kernel.params.clone(),
            static_shared: kernel.static_shared,
            local: kernel.local,
            max_threads: kernel.max_threads,
        })
    }
}

/// What the text declares, before bodies are decoded.
pub(crate) struct Draft {
    files: BTreeMap<u32, String>,
    pub(crate) variables: Vec<Variable>,
    pub(crate) functions: HashMap<String, Function>,
    entries: Vec<Function>,
}

impl Draft {
    fn read(&mut self, text: &mut Cursor) -> Result<(), ParseError> {
        while let Some(token) = text.peek() {
            let word = token.word().map(str::to_owned).ok_or_else(|| text.error("a directive was expected"))?;
            match word.as_str() {
                ".version" | ".target" | ".address_size" => text.skip_line(),
                ".visible" | ".weak" | ".extern" | ".common" => text.at += 1,
                ".file" => {
                    text.at += 1;
                    let number = text.number()?;
                    if let Some(Kind::Text(name)) = text.peek().map(|t| &t.kind) {
                        self.files.insert(u32::try_from(number).unwrap_or(0), (*name).to_owned());
                    }
                    text.at -= 2;
                    text.skip_line();
                }
                ".pragma" => text.skip_past(';')?,
                ".section" => text.skip_past('}')?,
                ".entry" => {
                    text.at += 1;
                    let entry = function(text)?;
                    self.entries.push(entry);
                }
                ".func" => {
                    text.at += 1;
                    let function = function(text)?;
                    if function.body.is_some() {
                        self.functions.insert(function.name.clone(), function);
                    }
                }
                ".global" | ".const" | ".shared" => {
                    let variable = variable(text)?;
                    self.variables.push(variable);
                }
                _ => return Err(text.error(format!("unknown directive {word}"))),
            }
        }
        Ok(())
    }
}

/// `(returned) name (parameters) directives { body }`, or `;` instead of the body.
fn function(text: &mut Cursor) -> Result<Function, ParseError> {
    let returned = if text.next_is('(') { params(text)? } else { Vec::new() };
    let name = text.word()?.to_owned();
    let given = if text.next_is('(') { params(text)? } else { Vec::new() };
    let mut function = Function { name, returned, given, body: None, max_threads: None };
    loop {
        if text.next_is(';') {
            text.at += 1;
            return Ok(function);
        }
        if text.next_is('{') {
            text.at += 1;
            function.body = Some(text.at);
            text.skip_block()?;
            return Ok(function);
        }
        let directive = text.word()?;
        match directive {
            ".maxntid" | ".reqntid" => {
                let mut threads = text.number()?;
                while text.next_is(',') {
                    text.at += 1;
                    threads *= text.number()?;
                }
                function.max_threads = u32::try_from(threads).ok();
            }
            ".minnctapersm" | ".maxnreg" | ".maxnctapersm" => {
                text.number()?;
            }
            ".noreturn" => {}
            ".pragma" => text.skip_past(';')?,
            _ => return Err(text.error(format!("unknown directive {directive}"))),
        }
    }
}

/// `(.param .align 8 .b8 name[16], ...)`: name, size and alignment of each.
fn params(text: &mut Cursor) -> Result<Vec<(String, usize, usize)>, ParseError> {
    text.expect('(')?;
    let mut found = Vec::new();
    while !text.next_is(')') {
        let space = text.word()?;
        if space != ".param" {
            return Err(text.error(format!("a parameter in {space} is not known")));
        }
        let (name, size, align) = declared(text)?;
        let size = size.ok_or_else(|| text.error("a parameter without a size"))?;
        found.push((name, size, align));
        if text.next_is(',') {
            text.at += 1;
        }
    }
    text.expect(')')?;
    Ok(found)
}

/// What follows the state space: alignment, type, name and dimensions. Returns (name, bytes if given, alignment).
pub(crate) fn declared(text: &mut Cursor) -> Result<(String, Option<usize>, usize), ParseError> {
    let (mut align, mut size, mut pointer) = (0, 0, false);
    loop {
        let word = text.word()?;
        match word {
            // Behind `.ptr` it is what is pointed at that is described.
            ".align" if pointer => _ = text.number()?,
            ".align" => align = text.number()?,
            ".ptr" => pointer = true,
            ".global" | ".const" | ".shared" | ".local" if pointer => {}
            _ if size == 0 => size = type_bytes(word).ok_or_else(|| text.error(format!("unknown type {word}")))?,
            _ => {
                let element = size;
                let mut total = Some(size);
                while text.next_is('[') {
                    text.at += 1;
                    if text.next_is(']') {
                        total = None;
                    } else {
                        let n = text.number()?;
                        total = total.map(|total| total * n);
                    }
                    text.expect(']')?;
                }
                return Ok((word.to_owned(), total, align.max(element)));
            }
        }
    }
}

/// A variable of a module or function; the cursor is at its state space.
pub(crate) fn variable(text: &mut Cursor) -> Result<Variable, ParseError> {
    let space = match text.word()? {
        ".global" => VarSpace::Global,
        ".const" => VarSpace::Const,
        ".shared" => VarSpace::Shared,
        _ => VarSpace::Local,
    };
    let mark = text.at;
    let element = text.tokens[mark..].iter().filter_map(Token::word).find_map(type_bytes).unwrap_or(1);
    let (name, size, align) = declared(text)?;
    let mut bytes = vec![0; size.unwrap_or(0)];
    if text.next_is('=') {
        text.at += 1;
        initialise(text, &mut bytes, element)?;
    }
    text.expect(';')?;
    Ok(Variable { name, space, align, bytes, unsized_: size.is_none() })
}

/// Numbers, perhaps in braces, each `element` bytes wide.
fn initialise(text: &mut Cursor, bytes: &mut [u8], element: usize) -> Result<(), ParseError> {
    let mut at = 0;
    let mut depth = 0;
    loop {
        if text.next_is('{') || text.next_is('}') || text.next_is(',') {
            depth += usize::from(text.next_is('{'));
            depth -= usize::from(text.next_is('}'));
            text.at += 1;
        } else {
            let value = text.value()?;
            let room = bytes.get_mut(at..at + element).ok_or_else(|| text.error("more values than the variable has room for"))?;
            room.copy_from_slice(&value.to_le_bytes()[..element]);
            at += element;
        }
        if depth == 0 {
            return Ok(());
        }
    }
}

pub(crate) fn type_bytes(word: &str) -> Option<usize> {
    Some(match word {
        ".u8" | ".s8" | ".b8" => 1,
        ".u16" | ".s16" | ".b16" | ".f16" | ".bf16" => 2,
        ".u32" | ".s32" | ".b32" | ".f32" | ".f16x2" | ".bf16x2" => 4,
        ".u64" | ".s64" | ".b64" | ".f64" => 8,
        _ => return None,
    })
}

/// A place in the tokens of a module.
pub(crate) struct Cursor<'t> {
    pub(crate) tokens: &'t [Token<'t>],
    pub(crate) at: usize,
}

impl<'t> Cursor<'t> {
    pub(crate) fn peek(&self) -> Option<&'t Token<'t>> {
        self.tokens.get(self.at)
    }

    pub(crate) fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |t| t.line)
    }

    pub(crate) fn error(&self, message: impl Into<String>) -> ParseError {
        ParseError::new(self.tokens.get(self.at.saturating_sub(1)).map_or(0, |t| t.line), message)
    }

    pub(crate) fn next_is(&self, sign: char) -> bool {
        self.peek().is_some_and(|t| t.is(sign))
    }

    pub(crate) fn expect(&mut self, sign: char) -> Result<(), ParseError> {
        if !self.next_is(sign) {
            return Err(self.error(format!("'{sign}' was expected, not {:?}", self.peek().map(|t| &t.kind))));
        }
        self.at += 1;
        Ok(())
    }

    pub(crate) fn word(&mut self) -> Result<&'t str, ParseError> {
        let word = self.peek().and_then(Token::word);
        self.at += 1;
        word.ok_or_else(|| self.error("a word was expected"))
    }

    pub(crate) fn number(&mut self) -> Result<usize, ParseError> {
        let value = self.value()?;
        usize::try_from(value).map_err(|_| self.error("too large a number"))
    }

    /// The bits of a number as it is written.
    pub(crate) fn value(&mut self) -> Result<u64, ParseError> {
        let negative = self.next_is('-');
        self.at += usize::from(negative);
        let word = self.word()?;
        let value = number(word).ok_or_else(|| self.error(format!("{word} is no number")))?;
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    pub(crate) fn skip_line(&mut self) {
        let line = self.line();
        while self.peek().is_some_and(|t| t.line == line) {
            self.at += 1;
        }
    }

    pub(crate) fn skip_past(&mut self, sign: char) -> Result<(), ParseError> {
        while !self.next_is(sign) {
            if self.peek().is_none() {
                return Err(self.error(format!("no '{sign}' follows")));
            }
            self.at += 1;
        }
        self.at += 1;
        Ok(())
    }

    /// Past the brace that closes the block that the cursor is in.
    fn skip_block(&mut self) -> Result<(), ParseError> {
        let mut depth = 1;
        while depth > 0 {
            let token = self.peek().ok_or_else(|| self.error("a block without end"))?;
            depth += usize::from(token.is('{'));
            depth -= usize::from(token.is('}'));
            self.at += 1;
        }
        Ok(())
    }
}

/// Bits of a number: decimal, hexadecimal, octal or binary, or a float by its bits (`0f3F800000`, `0d...`).
pub(crate) fn number(word: &str) -> Option<u64> {
    let word = word.strip_suffix('U').unwrap_or(word);
    let radix = |at: usize, radix: u32| u64::from_str_radix(&word[at..], radix).ok();
    match word.as_bytes() {
        [b'0', b'x' | b'X' | b'f' | b'F' | b'd' | b'D', _, ..] => radix(2, 16),
        [b'0', b'b' | b'B', _, ..] => radix(2, 2),
        [b'0', _, ..] => radix(1, 8),
        [b'0'..=b'9', ..] => radix(0, 10),
        _ => None,
    }
}
