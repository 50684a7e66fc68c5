//! Prompts from templates: the model's own chat template ([`ChatTemplate`]) and a user's template over a row's columns
//! ([`RowTemplate`]). Knows nothing of tokens or files. Invariant: a chat renders to the very text that `transformers`
//! renders (golden files in `tests/golden`), and to the same text at any time: templates see no clock.

use super::hf::{HfConfig, HfFiles};
use crate::allocator;
use crate::gguf::Gguf;
use crate::outcome::{ErrorCode, RowError};
use crate::request::{ChatOptions, Message, ToolChoice};
use crate::text::thinking::ThinkFormat;
use crate::text::tool_calls::CallFormat;
use anyhow::{Context, Result, anyhow, ensure};
use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, context, filters};
use serde::Serialize;
use serde_json::Map;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::collections::BTreeMap;
use std::io;

/// A model's chat template, compiled once; one for all threads.
#[derive(Clone)]
pub struct ChatTemplate {
    /// The compiled template, or why this model can render no messages.
    environment: Result<Environment<'static>, String>,
    source: Option<String>,
    call_format: Option<CallFormat>,
    thinks: bool,
    /// The special tokens it may name.
    specials: BTreeMap<String, String>,
    hash: String,
}

impl ChatTemplate {
    /// The template of a model file. A file without a template, or with one that does not compile, is still good for
    /// raw prompts: every `render` says what is wrong.
    ///
    /// # Errors
    /// A special token's id is not in the vocabulary.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let tokens = gguf.str_array("tokenizer.ggml.tokens").unwrap_or_default();
        let mut specials = BTreeMap::new();
        for (name, key) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")] {
            let key = format!("tokenizer.ggml.{key}_token_id");
            if let Some(id) = gguf.u64(&key) {
                let token = tokens.get(id as usize);
                let token = token.with_context(|| format!("{}: {key} is {id}: no such token", gguf.path().display()))?;
                specials.insert(name, *token);
            }
        }
        Ok(Self::from_source(gguf.str("tokenizer.chat_template"), &specials))
    }

    /// The template of a Hugging Face model directory, on the same terms as [`Self::from_gguf`].
    ///
    /// # Errors
    /// `tokenizer_config.json` or `generation_config.json` is not what it should be.
    pub fn from_hf(files: &HfFiles<'_>) -> Result<Self> {
        let config = HfConfig::read(files)?;
        let specials = config.specials.iter().map(|(name, token)| (name.as_str(), token.as_str())).collect();
        Ok(Self::from_source(config.chat_template.as_deref(), &specials))
    }

    fn from_source(source: Option<&str>, specials: &BTreeMap<&str, &str>) -> Self {
        let none = || {
            let environment = Err("the model has no chat template: give it raw prompts".to_owned());
            Self { environment, source: None, call_format: None, thinks: false, specials: owned(specials), hash: hash(&[]) }
        };
        source.map_or_else(none, |source| Self::new(source, specials))
    }

    /// A template with the special tokens it may name (`bos_token`, `eos_token`, …).
    pub fn new(source: &str, specials: &BTreeMap<&str, &str>) -> Self {
        let mut parts = vec![source];
        parts.extend(specials.iter().flat_map(|(name, token)| [*name, *token]));
        let mut environment = base_environment();
        // As transformers sets up Jinja for chat templates.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("only delimiters can be wrong"));
        for (name, token) in specials {
            environment.add_global((*name).to_owned(), *token);
        }
        let compiled = compile(environment, source, |environment| environment);
        let environment = compiled.map_err(|why| format!("the model's chat template does not compile: {why}"));
        Self {
            environment,
            source: Some(source.to_owned()),
            call_format: CallFormat::of_template(source),
            thinks: ThinkFormat::is_taught(source),
            specials: owned(specials),
            hash: hash(&parts),
        }
    }

    /// Another template for the same model: its special tokens have the same names.
    #[must_use]
    pub fn replaced(&self, source: &str) -> Self {
        let specials = self.specials.iter().map(|(name, token)| (name.as_str(), token.as_str())).collect();
        Self::new(source, &specials)
    }

    /// The template as its authors wrote it, if there is one.
    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// A special token by the name that templates have for it (`bos_token`, `eos_token`, …), if the model has it.
    pub fn special(&self, name: &str) -> Option<&str> {
        self.specials.get(name).map(String::as_str)
    }

    /// How the model writes function calls; `None` if its template does not teach it.
    pub fn call_format(&self) -> Option<CallFormat> {
        self.call_format
    }

    /// Whether it knows thoughts, in the form that [`ThinkFormat`] has.
    pub fn thinks(&self) -> bool {
        self.thinks
    }

    /// Renders a chat, with the assistant's turn opened at the end, or its last turn left open.
    ///
    /// # Errors
    /// `TemplateError` if the model has no usable template or the template refuses the messages.
    pub fn render_chat(&self, messages: &[Message], chat: &ChatOptions) -> Result<String, RowError> {
        if !chat.continue_final {
            return self.render(messages, true, chat);
        }
        let refuse = |message: &str| Err(RowError::row(ErrorCode::TemplateError, message));
        let Some(last) = messages.last().filter(|last| last.role == "assistant") else {
            return refuse("only a last message of the assistant's can be gone on with");
        };
        let content = last.content.trim();
        if content.is_empty() {
            return refuse("the assistant's message to go on with is empty");
        }
        // The template closes the turn after its text: the chat ends where a text stands that nothing else has.
        let mut marked = messages.to_vec();
        if let Some(last) = marked.last_mut() {
            MARK.clone_into(&mut last.content);
        }
        let text = self.render(&marked, false, chat)?;
        match text.rfind(MARK) {
            Some(start) => Ok(text[..start].to_owned() + content),
            None => refuse("the model's chat template changes the assistant's message: it can't be gone on with"),
        }
    }

    /// Renders a chat. `add_generation_prompt` opens the assistant's turn at the end.
    ///
    /// # Errors
    /// `TemplateError` if the model has no usable template or the template refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool, chat: &ChatOptions) -> Result<String, RowError> {
        let refuse = |message: String| RowError::row(ErrorCode::TemplateError, message);
        let environment = self.environment.as_ref().map_err(|why| refuse(why.clone()))?;
        let messages: Vec<Value> = messages.iter().map(message_value).collect();
        // transformers always passes tools and documents, as none if there are none.
        let tools = if chat.tools.is_empty() || chat.tool_choice == ToolChoice::None {
            Value::from(())
        } else {
            Value::from(Serde(&chat.tools))
        };
        let own = context! { messages, add_generation_prompt, tools, documents => () };
        let context = context! { ..own, ..Value::from(Serde(&chat.template_kwargs)) };
        render(environment, context).map_err(|why| refuse(format!("the model's chat template refused the messages: {why}")))
    }

    /// blake3 (hex) of the template and its special tokens; part of the fingerprint.
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// A user's template over the columns of a row, compiled once; one for all threads. Jinja's own defaults hold: blanks
/// around blocks stay, one line end at the template's end goes.
pub struct RowTemplate {
    environment: Environment<'static>,
    /// The names that the template takes from the row, sorted.
    columns: Vec<String>,
    /// The same with what is taken from within them (`a.b`).
    nested: Vec<String>,
}

impl RowTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// The source is no template; the message says where.
    pub fn compile(source: &str) -> Result<Self> {
        let mut environment = base_environment();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let with_names = |environment: Environment<'static>| {
            let [names, nested] = [false, true].map(|nested| compiled(&environment).undeclared_variables(nested));
            (environment, names, nested)
        };
        let (environment, names, nested) =
            compile(environment, source, with_names).map_err(|why| anyhow!("the template does not compile: {why}"))?;
        let mut columns: Vec<String> = names.into_iter().collect();
        columns.retain(|name| environment.globals().all(|(global, _)| global != name));
        columns.sort_unstable();
        ensure!(!source.trim().is_empty(), "the template is empty");
        Ok(Self { environment, columns, nested: nested.into_iter().collect() })
    }

    /// Names under `root` that the template uses (`root.NAME…`), sorted.
    pub fn names_under(&self, root: &str) -> Vec<String> {
        let under = self.nested.iter().filter_map(|path| path.strip_prefix(root)?.strip_prefix('.'));
        let mut names: Vec<String> = under.map(|rest| rest.split('.').next().unwrap_or(rest).to_owned()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The names that the template takes from the row, sorted.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Renders one row.
    ///
    /// # Errors
    /// `TemplateError` that says what the template refused, and names the columns that it knows and the row lacks.
    pub fn render(&self, columns: &Map<String, serde_json::Value>) -> Result<String, RowError> {
        render(&self.environment, Value::from(Serde(columns))).map_err(|why| {
            let mut message = format!("the template refused the row: {why}");
            let missing: Vec<_> = self.columns.iter().filter(|name| !columns.contains_key(*name)).map(String::as_str).collect();
            if !missing.is_empty() {
                let present: Vec<_> = columns.keys().take(MAX_NAMED_COLUMNS).map(String::as_str).collect();
                message = format!("{message}; the row has no column {} (it has: {})", missing.join(", "), present.join(", "));
            }
            RowError::row(ErrorCode::TemplateError, message)
        })
    }
}

/// Stands in for a message's text; no text has it (a private-use character, twice).
const MARK: &str = "\u{f8ff}answer\u{f8ff}";

/// An environment holds one template; messages call it this.
const NAME: &str = "template";

/// Most instructions that a template may take: a chat of a hundred thousand messages takes a fraction, an endless loop ends
/// after a second or two.
const MAX_STEPS: u64 = 20_000_000;

/// Longest template.
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// Most tokens (names, operators, literals) between one pair of delimiters, and in all of them: minijinja tries at each operator
/// of a chain whether all that is under it is constant, which takes the square of the chain's length.
const MAX_EXPRESSION_TOKENS: usize = 4096;
const MAX_TOKENS: usize = 16 * MAX_EXPRESSION_TOKENS;

/// The compiler's stack: so much, and so much more for every byte of the source. What is not used costs nothing.
const STACK_BYTES: (usize, usize) = (16 << 20, 1 << 10);

/// Largest count that `batch` and `slice` take: they fill up to it.
const MAX_FILTER_COUNT: usize = 100_000;

/// Longest text that a template may make; far more than any model's context holds.
const MAX_TEXT_BYTES: usize = 128 << 20;

/// Most memory that a template may take while it makes that text: one that doubles a text needs few steps.
const MAX_MEMORY: usize = 1 << 30;

/// Most of a row's own columns that an error names.
const MAX_NAMED_COLUMNS: usize = 20;

/// What both kinds of template can do beyond Jinja: Python's methods, and the functions that `transformers` adds. Not
/// `strftime_now`: templates that know it test whether it is there, and a prompt must not depend on the day.
fn base_environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_filter("batch", |state: &State<'_, '_>, value: Value, count: usize, fill: Option<Value>| {
        filters::batch(state, value, within(count)?, fill)
    });
    environment.add_filter("slice", |state: &State<'_, '_>, value: Value, count: usize, fill: Option<Value>| {
        filters::slice(state, value, within(count)?, fill)
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment
}

/// A count that a filter may be given.
fn within(count: usize) -> Result<usize, Error> {
    let refusal = || Error::new(ErrorKind::InvalidOperation, format!("{count} is over the limit of {MAX_FILTER_COUNT}"));
    (count <= MAX_FILTER_COUNT).then_some(count).ok_or_else(refusal)
}

fn owned(specials: &BTreeMap<&str, &str>) -> BTreeMap<String, String> {
    specials.iter().map(|(name, token)| ((*name).to_owned(), (*token).to_owned())).collect()
}

fn compiled<'a>(environment: &'a Environment<'static>) -> minijinja::Template<'a, 'a> {
    environment.get_template(NAME).expect("added when the environment was made")
}

/// Compiles a template and lets `then` look at it, on a stack that holds the longest expression that fits into a template:
/// minijinja walks chains of operators by recursion. What is wrong if it can't.
fn compile<T: Send>(
    mut environment: Environment<'static>,
    source: &str,
    then: impl FnOnce(Environment<'static>) -> T + Send,
) -> Result<T, String> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(format!("it has {} bytes, the limit is {MAX_SOURCE_BYTES}", source.len()));
    }
    check_expressions(source)?;
    let work = move || {
        environment.add_template_owned(NAME, source.to_owned()).map_err(|error| error.to_string())?;
        Ok(then(environment))
    };
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().stack_size(STACK_BYTES.0 + source.len() * STACK_BYTES.1).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| format!("no thread to compile it: {error}"))?;
        thread.join().unwrap_or_else(|_| Err("the compiler failed".to_owned()))
    })
}

/// Whether the template's expressions are within their limits; what else is wrong with them, the compiler says.
fn check_expressions(source: &str) -> Result<(), String> {
    let (mut n_tokens, mut n_all) = (0, 0);
    for (token, span) in tokenize(source, false, SyntaxConfig::default()).map_while(Result::ok) {
        n_tokens = if matches!(token, Token::VariableStart | Token::BlockStart) { 0 } else { n_tokens + 1 };
        n_all += 1;
        for (n, what, limit) in [(n_tokens, "an expression", MAX_EXPRESSION_TOKENS), (n_all, "it", MAX_TOKENS)] {
            if n > limit {
                return Err(format!("{what} has more than {limit} tokens (line {})", span.start_line));
            }
        }
    }
    Ok(())
}

/// Renders a template within its limits; what is wrong if it can't.
fn render(environment: &Environment<'static>, context: Value) -> Result<String, String> {
    let mut written = Written::default();
    let work = || compiled(environment).render_captured_to(context, &mut written).map(|_| ());
    let rendered = allocator::within(MAX_MEMORY, "a template", work);
    match rendered {
        Ok(()) => Ok(String::from_utf8(written.text).expect("templates write text")),
        Err(_) if written.is_too_long => Err(format!("it makes more than {} MiB of text", MAX_TEXT_BYTES >> 20)),
        Err(error) if error.kind() == ErrorKind::OutOfFuel => Err(format!("it takes more than {MAX_STEPS} steps")),
        Err(error) => Err(error.to_string()),
    }
}

/// What a template writes, up to a limit.
#[derive(Default)]
struct Written {
    text: Vec<u8>,
    is_too_long: bool,
}

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.is_too_long |= self.text.len() + bytes.len() > MAX_TEXT_BYTES;
        if self.is_too_long {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn message_value(message: &Message) -> Value {
    let Message { role, content, thought, name, tool_calls, tool_call_id } = message;
    // What a message has not is no key of it: templates ask `message.name is defined`.
    let mut shown: Map<String, serde_json::Value> = Map::new();
    shown.insert("role".into(), role.as_str().into());
    shown.insert("content".into(), content.as_str().into());
    if let Some(thought) = thought {
        shown.insert("reasoning_content".into(), thought.as_str().into());
    }
    if let Some(name) = name {
        shown.insert("name".into(), name.as_str().into());
    }
    if !tool_calls.is_empty() {
        shown.insert("tool_calls".into(), tool_calls.clone().into());
    }
    if let Some(id) = tool_call_id {
        shown.insert("tool_call_id".into(), id.as_str().into());
    }
    Value::from(Serde(&shown))
}

fn hash(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// `transformers`' `tojson`: Python's `json.dumps(value, ensure_ascii=False, indent=indent)`. Jinja's own, and
/// minijinja's, escape for HTML.
#[expect(clippy::needless_pass_by_value, reason = "minijinja gives filters their keyword arguments by value")]
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    if kwargs.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson(ensure_ascii=true) is not supported"));
    }
    kwargs.assert_all_used()?;
    let mut json = Written::default();
    let written = match indent {
        Some(n_blanks) => {
            let indent = " ".repeat(n_blanks.min(16));
            value.serialize(&mut Serializer::with_formatter(&mut json, PrettyFormatter::with_indent(indent.as_bytes())))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut json, PythonFormatter)),
    };
    if json.is_too_long {
        let message = format!("tojson makes more than {} MiB of text", MAX_TEXT_BYTES >> 20);
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, "tojson").with_source(error))?;
    Ok(String::from_utf8(json.text).expect("serde_json writes UTF-8"))
}

/// JSON on one line with Python's blanks: `{"a": 1, "b": [2, 3]}`.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
