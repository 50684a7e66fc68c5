//! Bodies that hold a batch's requests. They may be as long as a batch's file, so they are put on the disk as they come, and
//! read from there one request at a time. Invariant: the memory that one takes does not grow with it.

use super::App;
use super::body;
use super::errors::ApiError;
use super::files::Arriving;
use super::ids;
use anyhow::Context as _;
use axum::extract::{FromRequest, Request};
use futures::StreamExt as _;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

/// Bytes that are written at a time.
const PIECE: usize = 256 << 10;
/// Where the requests stand.
const REQUESTS: &str = "requests";

/// A body that is on the disk until this is dropped.
pub(super) struct BatchBody {
    path: PathBuf,
    _file: Arriving,
}

impl FromRequest<Arc<App>> for BatchBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let path = app.data.join("files").join(ids::new("body-"));
        let file = Arriving::at(path.clone());
        receive(app, request.into_body(), &path).await?;
        Ok(Self { path, _file: file })
    }
}

/// Writes a body to a file.
async fn receive(app: &App, content: axum::body::Body, path: &Path) -> Result<(), ApiError> {
    let limit = app.batch_body_bytes();
    let (mut chunks, start) = (content.into_data_stream(), Instant::now());
    let mut file = File::create_new(path).with_context(|| format!("cannot write {}", path.display()))?;
    let (mut n_bytes, mut piece) = (0, Vec::with_capacity(PIECE));
    loop {
        let chunk = timeout_at(body::end(start, app, n_bytes), chunks.next()).await.map_err(|_| body::too_slow())?;
        let is_end = chunk.is_none();
        let chunk = chunk.transpose().map_err(|_| body::broken_off())?.unwrap_or_default();
        n_bytes += chunk.len();
        if n_bytes > limit {
            if is_end || n_bytes > limit + body::MAX_DISCARDED {
                return Err(body::too_large(limit));
            }
            continue;
        }
        piece.extend_from_slice(&chunk);
        if piece.len() >= PIECE || is_end {
            let written = spawn_blocking(move || -> std::io::Result<_> {
                file.write_all(&piece)?;
                piece.clear();
                Ok((file, piece))
            });
            (file, piece) = written.await.context("writing a body panicked")?.with_context(|| path.display().to_string())?;
        }
        if is_end {
            return Ok(());
        }
    }
}

/// What a body says beside its requests.
pub(super) struct Head {
    /// All of its fields but the requests.
    pub(super) fields: Map<String, Value>,
    /// Whether it has any requests.
    pub(super) has_requests: bool,
}

impl BatchBody {
    /// What it says beside its requests.
    ///
    /// # Errors
    /// It is no JSON object.
    pub(super) async fn head(&self) -> Result<Head, ApiError> {
        let path = self.path.clone();
        let read = spawn_blocking(move || {
            let mut fields = Map::new();
            let has_requests = read(&path, &mut fields, &mut Skip)?.is_some();
            Ok(Head { fields, has_requests })
        });
        read.await.context("reading a body panicked")?
    }

    /// Writes a line for each of its requests to a new file, which is on the disk then; how many.
    ///
    /// # Errors
    /// The first that `line`, which is told its number from 0, refuses, or more than `most`.
    pub(super) async fn write_lines(
        &self,
        to: PathBuf,
        most: usize,
        line: impl FnMut(usize, &Value) -> Result<String, ApiError> + Send + 'static,
    ) -> Result<usize, ApiError> {
        let path = self.path.clone();
        let written = spawn_blocking(move || {
            let file = File::create_new(&to).with_context(|| to.display().to_string())?;
            let mut writer = Writer { line, most, out: BufWriter::new(file), n_lines: 0, fault: None };
            let read = read(&path, &mut Map::new(), &mut writer);
            if let Some(fault) = writer.fault.take() {
                return Err(fault);
            }
            read?;
            if writer.n_lines == 0 {
                return Err(ApiError::invalid_value(REQUESTS, format!("must hold 1 to {most} requests, holds 0")));
            }
            let written = writer.out.into_inner().map_err(std::io::IntoInnerError::into_error).and_then(|file| file.sync_all());
            written.with_context(|| to.display().to_string())?;
            Ok(writer.n_lines)
        });
        written.await.context("reading a body panicked")?
    }
}

/// Reads a body: its fields go to `fields`, its requests to `each`; how many there are, if it has any.
fn read(path: &Path, fields: &mut Map<String, Value>, each: &mut impl Each) -> Result<Option<usize>, ApiError> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let is_empty = file.metadata().with_context(|| path.display().to_string())?.len() == 0;
    let mut json = serde_json::Deserializer::from_reader(BufReader::with_capacity(PIECE, file));
    let mut n_requests = None;
    let object = Object { fields, each, n_requests: &mut n_requests };
    match Deserializer::deserialize_map(&mut json, object).and_then(|()| json.end()) {
        Ok(()) => Ok(n_requests),
        Err(error) if error.is_io() => Err(anyhow::Error::from(error).context(path.display().to_string()).into()),
        Err(error) if error.is_eof() && is_empty => Err(body::empty()),
        Err(error) if error.is_data() && n_requests.is_some() => {
            Err(ApiError::field("invalid_type", REQUESTS, "must be one array"))
        }
        Err(error) if error.is_data() => Err(body::no_object()),
        Err(error) => Err(body::no_json(&error)),
    }
}

/// What is done with each request.
trait Each {
    /// Takes the next out of the array; false if there is none.
    fn next<'de, A: SeqAccess<'de>>(&mut self, requests: &mut A) -> Result<bool, A::Error>;
}

/// Nothing.
struct Skip;

impl Each for Skip {
    fn next<'de, A: SeqAccess<'de>>(&mut self, requests: &mut A) -> Result<bool, A::Error> {
        Ok(requests.next_element::<IgnoredAny>()?.is_some())
    }
}

/// It is written as a line.
struct Writer<L> {
    line: L,
    most: usize,
    out: BufWriter<File>,
    n_lines: usize,
    /// Why it stopped.
    fault: Option<ApiError>,
}

impl<L: FnMut(usize, &Value) -> Result<String, ApiError>> Writer<L> {
    fn write(&mut self, request: &Value) -> Result<(), ApiError> {
        if self.n_lines >= self.most {
            let message = format!("must hold 1 to {} requests, holds more", self.most);
            return Err(ApiError::invalid_value(REQUESTS, message));
        }
        let line = (self.line)(self.n_lines, request)?;
        self.n_lines += 1;
        writeln!(self.out, "{line}").context("writing a batch's requests").map_err(ApiError::from)
    }
}

impl<L: FnMut(usize, &Value) -> Result<String, ApiError>> Each for Writer<L> {
    fn next<'de, A: SeqAccess<'de>>(&mut self, requests: &mut A) -> Result<bool, A::Error> {
        let Some(request) = requests.next_element::<Value>()? else { return Ok(false) };
        self.write(&request).map_err(|fault| {
            self.fault = Some(fault);
            A::Error::custom("refused")
        })?;
        Ok(true)
    }
}

/// The body.
struct Object<'b, E> {
    fields: &'b mut Map<String, Value>,
    each: &'b mut E,
    n_requests: &'b mut Option<usize>,
}

impl<'de, E: Each> Visitor<'de> for Object<'_, E> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == REQUESTS {
                let before = self.n_requests.replace(0);
                *self.n_requests = map.next_value_seed(Requests(&mut *self.each))?;
                if before.is_some() {
                    return Err(A::Error::custom("requests stands there twice"));
                }
            } else {
                self.fields.insert(key, map.next_value()?);
            }
        }
        Ok(())
    }
}

/// The array of its requests; how many.
struct Requests<'b, E>(&'b mut E);

impl<'de, E: Each> DeserializeSeed<'de> for Requests<'_, E> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Option<usize>, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de, E: Each> Visitor<'de> for Requests<'_, E> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array")
    }

    fn visit_unit<R>(self) -> Result<Option<usize>, R> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut requests: A) -> Result<Option<usize>, A::Error> {
        let mut n_requests = 0;
        while self.0.next(&mut requests)? {
            n_requests += 1;
        }
        Ok(Some(n_requests))
    }
}
