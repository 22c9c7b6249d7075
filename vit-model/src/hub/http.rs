//! The HTTP requests for fetching. The token goes only to the Hub, every wait has a time limit, and there are few retries.

use std::io::Read;
use std::time::{Duration, Instant};

use ureq::http::{Response, StatusCode, Uri};

use super::HubOptions;
use crate::{Error, Result};

const MAX_REDIRECTS: usize = 5;
/// The lowest accepted rate in bytes per second, averaged over `HubOptions::patience`.
const MIN_RATE: u64 = 1000;
/// How often a request is repeated after a failure that may be temporary.
const RETRIES: u32 = 3;
/// The wait before the first retry. Each further wait is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The limit for all waits of one request together. If the server asks for more, the request fails and the error says so.
const MAX_WAIT: Duration = Duration::from_secs(10);

pub(super) struct Client {
    agent: ureq::Agent,
    endpoint: String,
    origin: Origin,
    token: Option<String>,
    patience: Duration,
}

/// The response to a HEAD request for a file.
#[derive(Debug)]
pub(super) struct Meta {
    pub commit: String,
    pub etag: String,
    pub size: Option<u64>,
}

/// A response with the content of a file.
pub(super) struct Body {
    pub reader: Box<dyn Read>,
    /// The offset in the file of the first byte in `reader`.
    pub offset: u64,
    /// The size of the whole file, if the response has it.
    pub total: Option<u64>,
}

/// Scheme, host and port. The token is sent only to the endpoint's origin.
#[derive(PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    fn of(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let scheme = uri.scheme_str()?.to_lowercase();
        let port = match (uri.port_u16(), scheme.as_str()) {
            (Some(port), "http" | "https") => port,
            (None, "http") => 80,
            (None, "https") => 443,
            _ => return None,
        };
        Some(Self { host: uri.host()?.to_lowercase(), scheme, port })
    }
}

#[derive(Clone, Copy)]
enum Ask {
    Head,
    /// A GET request for the bytes from this offset on.
    From(u64),
}

impl Client {
    pub fn new(options: &HubOptions) -> Result<Self> {
        let endpoint = options.endpoint.trim_end_matches('/').to_owned();
        let Some(origin) = Origin::of(&endpoint) else {
            return Err(Error::Hub(format!("HF_ENDPOINT {endpoint:?} is not an http or https URL")));
        };
        if options.token.as_ref().is_some_and(|t| !t.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::Hub("the token (HF_TOKEN) contains characters that are not allowed in a token".into()));
        }
        let patience = Some(options.patience);
        // a proxy cannot reach a mirror on this machine
        let is_here = matches!(origin.host.as_str(), "127.0.0.1" | "localhost" | "[::1]");
        let proxy = if is_here { None } else { ureq::Proxy::try_from_env() };
        let agent = ureq::Agent::config_builder()
            .proxy(proxy)
            .http_status_as_error(false)
            // `Client` follows redirects itself, to control where the token goes
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("vit-model/", env!("CARGO_PKG_VERSION")))
            // sizes and ranges of a compressed response are not those of the file
            .accept_encoding("identity")
            .timeout_resolve(patience)
            .timeout_connect(patience)
            .timeout_recv_response(patience)
            .timeout_per_read(patience)
            .build()
            .into();
        Ok(Self { agent, endpoint, origin, token: options.token.clone(), patience: options.patience })
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub fn pace(&self) -> Pace {
        Pace { patience: self.patience, since: Instant::now(), bytes: 0 }
    }

    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// How long the endpoint takes to answer one request.
    pub fn reach(&self) -> Result<Duration> {
        let started = Instant::now();
        match self.agent.head(&self.endpoint).call() {
            Ok(_) => Ok(started.elapsed()),
            Err(error) => Err(Error::Hub(format!("{}: {error}", self.endpoint))),
        }
    }

    /// Sends a HEAD request for a file. Returns `None` if the repository has no such file.
    pub fn head(&self, url: &str) -> Result<Option<Meta>> {
        let (mut at, mut commit) = (url.to_owned(), None);
        for _ in 0..=MAX_REDIRECTS {
            let mut answer = self.request(&at, Ask::Head)?;
            if matches!(answer.status(), StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED) {
                answer = self.request(&at, Ask::From(0))?; // a mirror without HEAD; the body is not read
            }
            commit = header(&answer, "x-repo-commit").or(commit);
            // follow the Hub's redirects for renamed repositories, but not those for weights, which lead to another host: the
            // Hub's own response already has all that is needed
            if answer.status().is_redirection() && header(&answer, "x-linked-etag").is_none() {
                at = self.redirect(&at, &answer)?;
                continue;
            }
            if missing(&answer) {
                return Ok(None);
            }
            if !answer.status().is_success() && !answer.status().is_redirection() {
                return Err(refusal(&at, &answer));
            }
            let tell = |name: &str| {
                Error::Hub(format!("{url}: the response has no {name}: is this the Hub or a mirror of it?"))
            };
            let etag = header(&answer, "x-linked-etag").or_else(|| header(&answer, "etag"));
            let etag = etag.ok_or_else(|| tell("ETag"))?;
            let length = header(&answer, "x-linked-size").or_else(|| {
                let plain = answer.status() == StatusCode::OK;
                header(&answer, "content-length").filter(|_| plain)
            });
            return Ok(Some(Meta {
                commit: commit.ok_or_else(|| tell("X-Repo-Commit"))?,
                etag: etag.trim_start_matches("W/").trim_matches('"').to_owned(),
                size: length.and_then(|l| l.parse().ok()),
            }));
        }
        Err(Error::Hub(format!("{url}: more than {MAX_REDIRECTS} redirects")))
    }

    /// Starts to download a file from `offset` on. The server may ignore the offset and send the whole file.
    pub fn get(&self, url: &str, offset: u64, size: Option<u64>) -> Result<Body> {
        let mut at = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.request(&at, Ask::From(offset))?;
            match answer.status() {
                status if status.is_redirection() => at = self.redirect(&at, &answer)?,
                StatusCode::OK => {
                    let total = header(&answer, "content-length").and_then(|l| l.parse().ok());
                    return Ok(Body { reader: Box::new(answer.into_body().into_reader()), offset: 0, total });
                }
                StatusCode::PARTIAL_CONTENT => {
                    // for example: bytes 100-199/200
                    let range = header(&answer, "content-range").unwrap_or_default();
                    let (span, total) = range.trim_start_matches("bytes ").split_once('/').unwrap_or_default();
                    let start = span.split('-').next().and_then(|s| s.parse::<u64>().ok());
                    let total = total.parse::<u64>().ok();
                    if start != Some(offset) || (size.is_some() && total.is_some() && total != size) {
                        return Err(Error::Hub(format!(
                            "{at}: requested the bytes from {offset} on, but got {range:?}"
                        )));
                    }
                    return Ok(Body { reader: Box::new(answer.into_body().into_reader()), offset, total });
                }
                _ => return Err(refusal(&at, &answer)),
            }
        }
        Err(Error::Hub(format!("{url}: more than {MAX_REDIRECTS} redirects")))
    }

    /// Sends a request, and repeats it after failures that may be temporary: too many requests, a server error, a lost
    /// connection.
    fn request(&self, url: &str, ask: Ask) -> Result<Response<ureq::Body>> {
        let mut waits = Waits::default();
        loop {
            let (error, asked) = match self.once(url, ask) {
                Ok(answer) if !matches!(answer.status().as_u16(), 429 | 500 | 502 | 503 | 504) => return Ok(answer),
                Ok(answer) => (refusal(url, &answer), header(&answer, "retry-after").and_then(|s| s.parse().ok())),
                Err(error) if broke(&error) => (self.unreachable(url, error), None),
                Err(error) => return Err(self.unreachable(url, error)),
            };
            match waits.next(asked.map(Duration::from_secs)) {
                Some(wait) => std::thread::sleep(wait),
                None => return Err(error),
            }
        }
    }

    fn once(&self, url: &str, ask: Ask) -> Result<Response<ureq::Body>, ureq::Error> {
        let mut request = match ask {
            Ask::Head => self.agent.head(url),
            Ask::From(_) => self.agent.get(url),
        };
        if let Ask::From(offset @ 1..) = ask {
            request = request.header("Range", format!("bytes={offset}-"));
        }
        let at_home = Origin::of(url).is_some_and(|origin| origin == self.origin);
        if let Some(token) = self.token.as_ref().filter(|_| at_home) {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        request.call()
    }

    fn unreachable(&self, url: &str, error: ureq::Error) -> Error {
        let why = match error {
            ureq::Error::Timeout(_) => format!("no answer within {} s", self.patience.as_secs_f32()),
            ureq::Error::HostNotFound => "no such host, or no network".into(),
            ureq::Error::Io(e) => e.to_string(),
            other => other.to_string(),
        };
        Error::Hub(format!("{url}: {why}"))
    }

    /// The URL that a response redirects to. An https endpoint may only redirect to https.
    fn redirect(&self, from: &str, answer: &Response<ureq::Body>) -> Result<String> {
        let fail = |why: &str| Err(Error::Hub(format!("{from}: {} {why}", answer.status().as_u16())));
        let Some(location) = header(answer, "location") else { return fail("redirects to nowhere") };
        let target = if location.starts_with('/') && !location.starts_with("//") {
            let base = from.parse::<Uri>().ok();
            let base = base.as_ref().and_then(|uri| Some((uri.scheme_str()?, uri.authority()?)));
            let Some((scheme, authority)) = base else { return fail("redirects to nowhere") };
            format!("{scheme}://{authority}{location}")
        } else {
            location
        };
        match Origin::of(&target) {
            None => fail("redirects to something that is not an http or https URL"),
            Some(to) if self.origin.scheme == "https" && to.scheme != "https" => fail("redirects away from https"),
            Some(_) => Ok(target),
        }
    }
}

/// A header's value, unless it is too long or contains other than visible ASCII characters.
fn header(answer: &Response<ureq::Body>, name: &str) -> Option<String> {
    let value = answer.headers().get(name)?.to_str().ok()?.trim();
    (value.len() <= 4096).then(|| value.to_owned())
}

/// Whether the repository exists but the file does not.
fn missing(answer: &Response<ureq::Body>) -> bool {
    let code = header(answer, "x-error-code").unwrap_or_default();
    answer.status() == StatusCode::NOT_FOUND && !matches!(code.as_str(), "RepoNotFound" | "RevisionNotFound")
}

/// Whether the connection was lost before a response arrived, which may happen on any network.
fn broke(error: &ureq::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error, ureq::Error::Io(e) if matches!(e.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof))
}

/// The error for a response that is not a success, with what to do about it.
fn refusal(url: &str, answer: &Response<ureq::Body>) -> Error {
    let code = header(answer, "x-error-code").unwrap_or_default();
    let status = answer.status();
    let advice = match (status.as_u16(), code.as_str()) {
        (401, _) => {
            "there is no such repository, or it is private: check the name, or set HF_TOKEN to a token that may read it"
        }
        (403, _) => {
            "access is restricted: accept the model's terms on its page, and set HF_TOKEN to a token that may read it"
        }
        (404, "RevisionNotFound") => "there is no such branch, tag or commit",
        (404, "RepoNotFound") => "there is no such repository, or it is private (set HF_TOKEN)",
        (404, _) => "the file was announced but does not exist",
        (416, _) => "the file is shorter than announced",
        (429, _) => "too many requests",
        (500.., _) => "the server has a problem; try again later",
        _ => "unexpected status",
    };
    let retry = match header(answer, "retry-after") {
        Some(after) if after.bytes().all(|b| b.is_ascii_digit()) => {
            format!("; the server asks to wait for {after} seconds")
        }
        Some(after) => format!("; the server asks to wait until {after:?}"),
        None => String::new(),
    };
    let reason = status.canonical_reason().unwrap_or_default();
    Error::Hub(format!("{url}: {} {reason}: {advice}{retry}", status.as_u16()))
}

/// Computes how long to wait before the next retry, and when to give up.
#[derive(Default)]
pub(super) struct Waits {
    tries: u32,
    waited: Duration,
}

impl Waits {
    /// The wait before the next retry, or `None` to give up. `asked` is the wait that the server asked for.
    pub fn next(&mut self, asked: Option<Duration>) -> Option<Duration> {
        let wait = asked.unwrap_or_else(|| FIRST_WAIT.saturating_mul(2_u32.saturating_pow(self.tries)));
        let waited = self.waited.saturating_add(wait);
        if self.tries >= RETRIES || waited > MAX_WAIT {
            return None;
        }
        (self.tries, self.waited) = (self.tries.saturating_add(1), waited);
        Some(wait)
    }
}

/// Measures whether a download is fast enough.
pub(super) struct Pace {
    patience: Duration,
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// Counts received bytes. Returns false if too few arrived during the last `patience`.
    pub fn keeps_up(&mut self, bytes: u64) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.since.elapsed() < self.patience {
            return true;
        }
        let least = u128::from(MIN_RATE).saturating_mul(self.patience.as_millis());
        let enough = u128::from(self.bytes).saturating_mul(1000) >= least;
        (self.since, self.bytes) = (Instant::now(), 0);
        enough
    }
}
