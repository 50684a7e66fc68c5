//! Dataset rows: columns to prompts through the templates of a job's steps. A step whose templates use what another step
//! gave (`steps.NAME.completion`, `steps.NAME.parsed`) waits for it; the others can run at once.

use super::{Preparer, Prompt};
use crate::format::openai;
use crate::outcome::{ErrorCode, RowError};
use crate::request::{ChatOptions, Input, Message, Params, Request, Truncate};
use crate::text::template::RowTemplate;
use serde_json::{Map, Value, json};

/// One prompt of every row.
pub struct Step {
    /// Its name; empty where the job has one step only.
    pub name: String,
    /// What the model is given.
    pub template: PromptTemplate,
    /// How it is completed.
    pub params: Params,
    /// Indices of the steps whose answers it uses.
    pub needs: Vec<usize>,
}

/// A dataset row's templates.
pub struct PromptTemplate {
    /// The prompt's turns; one of role "" is a prompt as it is, without the model's chat template.
    pub turns: Vec<Turn>,
    /// Text that the answer begins with.
    pub prefill: Option<RowTemplate>,
    /// Text that is scored as the answer; nothing is generated then.
    pub continuation: Option<RowTemplate>,
}

/// One or several turns of a chat.
pub enum Turn {
    /// (role, text)
    Template(String, RowTemplate),
    /// The same for every row.
    Fixed(Message),
    /// A column that holds messages: `[{"role", "content"}, …]`.
    Column(String),
}

/// What a step gave.
#[derive(Debug, Clone)]
pub struct StepAnswer {
    /// Its (first) completion.
    pub text: String,
    /// The completion as JSON, where its format is JSON and it is whole.
    pub parsed: Option<Value>,
}

impl Step {
    /// What messages call its settings.
    pub(super) fn field(&self) -> String {
        if self.name.is_empty() { "prompt.".to_owned() } else { format!("step {}: ", self.name) }
    }
}

impl PromptTemplate {
    /// Its templates.
    pub fn templates(&self) -> impl Iterator<Item = &RowTemplate> {
        let turns =
            self.turns.iter().filter_map(|turn| if let Turn::Template(_, template) = turn { Some(template) } else { None });
        turns.chain(&self.prefill).chain(&self.continuation)
    }
}

/// A row's columns, and what its steps have given under `steps`.
pub(super) fn with_answers(
    mut columns: Map<String, Value>,
    steps: &[Step],
    answers: &[Option<StepAnswer>],
) -> Map<String, Value> {
    let given = steps.iter().zip(answers).filter_map(|(step, answer)| {
        let answer = answer.as_ref()?;
        Some((step.name.clone(), json!({"completion": answer.text, "parsed": answer.parsed})))
    });
    columns.insert("steps".into(), Value::Object(given.collect()));
    columns
}

impl Preparer {
    /// The row's own columns.
    pub(super) fn read_columns(&self, text: &str) -> Result<Map<String, Value>, RowError> {
        let columns = openai::parse_object(text)?;
        if let Some(name) = self.result_columns.iter().find(|name| columns.contains_key(*name)) {
            let message = "the row has a column of the same name as a result column; set output.prefix";
            return Err(RowError::field(ErrorCode::InvalidValue, name, message));
        }
        Ok(columns)
    }

    /// The prompt of one step.
    pub(super) fn step_prompt(
        &self,
        row_idx: u64,
        steps: &[Step],
        step: usize,
        columns: &Map<String, Value>,
    ) -> Result<Prompt, RowError> {
        let Step { template, params, name, .. } = &steps[step];
        let field = if name.is_empty() { "prompt".to_owned() } else { format!("step {name}") };
        let mut messages = Vec::new();
        for turn in &template.turns {
            match turn {
                Turn::Template(role, text) => {
                    let content = text.render(columns)?;
                    messages.push(Message { role: role.clone(), content, ..Message::default() });
                }
                Turn::Fixed(message) => messages.push(message.clone()),
                Turn::Column(column) => messages.extend(column_messages(columns, column)?),
            }
        }
        let prefill = template.prefill.as_ref().map(|prefill| prefill.render(columns)).transpose()?;
        let input = match messages.as_slice() {
            [only] if only.role.is_empty() => Input::Text(only.content.clone() + prefill.as_deref().unwrap_or_default()),
            _ => {
                messages.extend(prefill.map(|content| Message { role: "assistant".into(), content, ..Message::default() }));
                Input::Messages(messages)
            }
        };
        let continue_final = matches!(input, Input::Messages(_)) && template.prefill.is_some();
        let mut request = Request {
            row_idx,
            model: None,
            inputs: Vec::new(),
            params: params.clone(),
            chat: ChatOptions { continue_final, ..ChatOptions::default() },
            truncate: Truncate::Never,
        };
        let Some(continuation) = &template.continuation else {
            let prompt = self.prompt(&request, &input, &field)?;
            return Ok(Prompt { step, ..prompt });
        };
        let before = match &input {
            Input::Messages(messages) => self.template.render_chat(messages, &request.chat)?,
            Input::Text(text) => text.clone(),
            Input::Tokens(_) => unreachable!("templates make text"),
        };
        let whole = before.clone() + &continuation.render(columns)?;
        request.params = Params { max_tokens: Some(0), logprobs: Some(1), ..request.params };
        let prompt = self.prompt(&request, &Input::Text(whole), &field)?;
        // Where the two texts' tokens part; a token over the border belongs to what is scored.
        let before = self.tokenizer.encode(&before);
        let n_before = before.iter().zip(prompt.tokens.iter()).take_while(|(a, b)| a == b).count();
        if n_before == prompt.tokens.len() {
            return Err(RowError::field(ErrorCode::InvalidValue, field, "the continuation has no tokens"));
        }
        Ok(Prompt { step, score_from: Some(n_before.max(1) as u32), ..prompt })
    }
}

/// The messages that a column holds.
fn column_messages(columns: &Map<String, Value>, column: &str) -> Result<Vec<Message>, RowError> {
    let bad = |message: String| RowError::field(ErrorCode::InvalidValue, column, message);
    let items = columns.get(column).and_then(Value::as_array);
    let items = items.ok_or_else(|| bad("must be a list of messages".into()))?;
    let text = |item: &Value, key: &str| item.get(key).and_then(Value::as_str).map(str::to_owned);
    let messages = items.iter().enumerate().map(|(i, item)| {
        let role = text(item, "role").ok_or_else(|| bad(format!("message {i} has no role")))?;
        let content = text(item, "content").ok_or_else(|| bad(format!("message {i} has no content that is text")))?;
        Ok(Message { role, content, ..Message::default() })
    });
    messages.collect()
}
