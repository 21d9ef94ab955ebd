package secretsv1

const file_rawDesc = "\x0a\x07a.proto\x22&\x0a\x10PutSecretRequest\x12\x12\x0a\x05value\x18\x02 \x01(\x09B\x03\x80\x01\x01"

type PutSecretRequest struct {
	Value string `protobuf:"bytes,2,opt,name=value,proto3" json:"value,omitempty"` // want Value:"secret"
}

func (*PutSecretRequest) ProtoReflect()      {}
func (x *PutSecretRequest) String() string   { return x.Value }
func (x *PutSecretRequest) GetValue() string { return x.Value } // want GetValue:"secret"

type SecretKind int32

func (SecretKind) String() string { return "" }
