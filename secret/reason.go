package secret

// Reason is why a call was refused or failed: the word in the ErrorInfo of an
// error and at the beginning of its message.
type Reason string

// All reasons that the broker gives.
const (
	InvalidInstanceID      Reason = "INVALID_INSTANCE_ID"
	InvalidKind            Reason = "INVALID_KIND"
	InvalidValue           Reason = "INVALID_VALUE"
	InvalidRequest         Reason = "INVALID_REQUEST"
	RequestIDReused        Reason = "REQUEST_ID_REUSED"
	SecretNotFound         Reason = "SECRET_NOT_FOUND"
	VersionNotFound        Reason = "VERSION_NOT_FOUND"
	SecretExists           Reason = "SECRET_EXISTS"
	VersionMismatch        Reason = "VERSION_MISMATCH"
	SecretDisabled         Reason = "SECRET_DISABLED"
	SecretDeleted          Reason = "SECRET_DELETED"
	SecretNotDeleted       Reason = "SECRET_NOT_DELETED"
	ValueUnchanged         Reason = "VALUE_UNCHANGED"
	VersionExpired         Reason = "VERSION_EXPIRED"
	KeyMismatch            Reason = "KEY_MISMATCH"
	CallerUnknown          Reason = "CALLER_UNKNOWN"
	CallerNotAllowed       Reason = "CALLER_NOT_ALLOWED"
	CallerQuotaExceeded    Reason = "CALLER_QUOTA_EXCEEDED"
	VaultUnavailable       Reason = "VAULT_UNAVAILABLE"
	VaultThrottled         Reason = "VAULT_THROTTLED"
	VaultRefused           Reason = "VAULT_REFUSED"
	StalenessUnsatisfiable Reason = "STALENESS_UNSATISFIABLE"
	AuditUnavailable       Reason = "AUDIT_UNAVAILABLE"
	ShuttingDown           Reason = "SHUTTING_DOWN"
	DeadlineExceeded       Reason = "DEADLINE_EXCEEDED"
	Cancelled              Reason = "CANCELLED"
	Defect                 Reason = "DEFECT"
)

// CommitState says of a write that ended with an error whether it happened.
type CommitState string

// The three commit states. The zero value is for calls that write nothing.
const (
	// NotApplied: it did not and will not happen.
	NotApplied CommitState = "NOT_APPLIED"
	// Applied: it happened, in spite of the error.
	Applied CommitState = "APPLIED"
	// Unknown: it may have happened or may yet. The same request id tells.
	Unknown CommitState = "UNKNOWN"
)
