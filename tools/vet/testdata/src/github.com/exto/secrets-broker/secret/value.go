package secret

// Value prints as ***.
type Value struct{ s *string }

func (v Value) Reveal() string { return *v.s }
func (Value) String() string   { return "***" }
